"""Sampled text under a sharing map."""

from dataclasses import dataclass

import torch

from skv_dist.config.run import RunConfig
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.parallel.decode import Decoder, likeliest
from skv_dist.parallel.engines.base import Engine
from skv_dist.routing import RoutePlan


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        new_tokens: largest number of them.
        temperature: 0 takes the likeliest token.
        seed: of the draws.
        ends: ids behind which nothing is drawn, beside the tokenizer's end of a document.
    """

    new_tokens: int
    temperature: float
    seed: int
    ends: frozenset[int] = frozenset()


def sample_text(
    engine: Engine, run: RunConfig, tokenizer: Tokenizer, plan: RoutePlan, prompt: str, sampling: Sampling
) -> str:
    """Continue ``prompt``. Collective.

    The model never sees more than ``data.sequence_length`` tokens: when they are reached, it goes on with the second
    half of them.
    """
    window = run.data.sequence_length
    ids = [int(i) for i in tokenizer.encode(prompt)]
    if tokenizer.begin_of_document is not None or not ids:
        ids.insert(0, tokenizer.end_of_document if tokenizer.begin_of_document is None else tokenizer.begin_of_document)
    generator = torch.Generator().manual_seed(sampling.seed)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        if sampling.temperature == 0:
            return likeliest(logits)
        likely = torch.softmax(logits.cpu() / sampling.temperature, -1)
        return torch.multinomial(likely, 1, generator=generator)[:, 0]

    decoder, ends = Decoder(engine, run, plan), sampling.ends | {tokenizer.end_of_document}
    said: list[int] = []
    while len(said) < sampling.new_tokens:
        seen = (ids + said)[-window + 1 :] if not said else (ids + said)[-(window // 2) :]
        asked = min(sampling.new_tokens - len(said), window - len(seen))
        (answer,) = decoder.continue_prompts([seen], asked, ends, choose, tokenizer.end_of_document)
        said += answer
        if len(answer) < asked:
            break
    return tokenizer.decode(said)
