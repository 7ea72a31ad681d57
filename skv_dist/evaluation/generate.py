"""Sampled text under a sharing map."""

import torch
import torch.distributed as dist

from skv_dist.data.tokenizer import Tokenizer
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.processes.groups import World
from skv_dist.routing import RoutePlan


@torch.no_grad()
def sample_text(
    engine: Engine,
    world: World,
    tokenizer: Tokenizer,
    plan: RoutePlan,
    prompt: str,
    new_tokens: int,
    *,
    temperature: float,
    max_length: int,
    seed: int,
    multiple: int = 1,
) -> str:
    """Continue ``prompt`` by up to ``new_tokens`` tokens. Collective.

    For a look at a model: the whole context is computed anew for each token, no cache is kept (engines do that).

    Args:
        temperature: 0 takes the likeliest token.
        max_length: number of last tokens that the model sees.
        multiple: lengths are padded to this (``parallel.tensor`` with sequence parallelism).
    """
    ids = [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.end_of_document]
    begin = len(ids)
    generator = torch.Generator().manual_seed(seed)
    engine.model.eval()
    for _ in range(new_tokens):
        seen = ids[-max_length:]
        padded = seen + [tokenizer.end_of_document] * (-len(seen) % multiple)
        logits = engine.forward(0, plan, torch.tensor([padded], device=world.device))[0, len(seen) - 1]
        logits = logits.float().cpu()[: tokenizer.vocab_size]
        if temperature == 0:
            chosen = logits.argmax(keepdim=True)
        else:
            chosen = torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator)
        chosen = chosen.to(world.device)
        dist.broadcast(chosen, 0)
        if int(chosen) == tokenizer.end_of_document:
            break
        ids.append(int(chosen))
    return tokenizer.decode(ids[begin:])
