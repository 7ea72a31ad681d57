"""A model of given weights, measured and sampled from in any layout."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.support import engine as engines
from tests.support.engine import built


def random_sample(position: int, sequence: int, vocab_size: int) -> Any:
    """Tokens that depend on the position alone."""
    from skv_dist.data.packing import Sample

    tokens = np.random.default_rng(position).integers(0, vocab_size, sequence + 1)
    return Sample(tokens, np.zeros(sequence + 1, np.int64))


def swept_losses(
    settings: dict[str, Any], weights: dict[str, np.ndarray], tables: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
    """Loss by map over the first ``eval.samples`` random samples. With no tables: those of ``eval.retention``."""
    from skv_dist.evaluation.sweep import evaluation_batches, retention_plans, sweep
    from skv_dist.routing import RoutePlan

    class Samples:
        def __getitem__(self, position: int) -> Any:
            return random_sample(position, run.data.sequence_length, run.vocab_size)

    with built(settings) as (run, world):
        engine = engines.frozen_engine(run, world)
        engines.assign_full(engine, run, world, weights)
        plans = {name: RoutePlan(table) for name, table in tables.items()} or retention_plans(run)
        return sweep(engine, run, evaluation_batches(run, world, Samples()), plans)


def sampled_tokens(
    settings: dict[str, Any], weights: dict[str, np.ndarray], table: list[int], prompt: str, **sampling: Any
) -> list[int]:
    """The tokens of `sample_text`."""
    from skv_dist.data.tokenizer import ByteTokenizer
    from skv_dist.evaluation.generate import Sampling, sample_text
    from skv_dist.routing import RoutePlan

    class Numbers(ByteTokenizer):
        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    with built(settings) as (run, world):
        engine = engines.frozen_engine(run, world)
        engines.assign_full(engine, run, world, weights)
        text = sample_text(engine, run, Numbers(), RoutePlan(table), prompt, Sampling(**sampling))
        return [int(number) for number in text.split()]


def decoded(
    settings: dict[str, Any],
    weights: dict[str, np.ndarray],
    table: list[int],
    prompts: list[list[int]],
    new_tokens: int,
    ends: list[int],
    enough: int | None = None,
) -> tuple[list[list[int]], int]:
    """The likeliest answers, and the bytes of cache that a token takes on this rank.

    Args:
        enough: tokens that make an answer complete.
    """
    from skv_dist.parallel.decode import Decoder, likeliest
    from skv_dist.routing import RoutePlan

    with built(settings) as (run, world):
        engine = engines.frozen_engine(run, world)
        engines.assign_full(engine, run, world, weights)
        decoder = Decoder(engine, run, RoutePlan(table))
        answers = decoder.continue_prompts(
            prompts, new_tokens, frozenset(ends), likeliest, pad=0, is_complete=lambda answer: len(answer) == enough
        )
        return answers, decoder.cache_bytes_per_token


def prefilled(
    settings: dict[str, Any],
    weights: dict[str, np.ndarray],
    table: list[int],
    prompts: list[list[int]],
    new_tokens: int,
    skips: bool,
) -> tuple[list[list[int]], list[np.ndarray], dict[int, int]]:
    """The likeliest answers, the logits of each new token [b, V] (of the last stage), and over how many positions each
    layer of this rank ran at the prompts.

    Args:
        skips: whether trailing layers run over the last position alone.
    """
    from unittest.mock import patch

    from skv_dist.parallel.decode import Decoder, likeliest
    from skv_dist.routing import RoutePlan

    logits: list[np.ndarray] = []
    rows: dict[int, int] = {}

    def choose(given: Any) -> Any:
        logits.append(given.numpy())
        return likeliest(given)

    with built(settings) as (run, world):
        engine = engines.frozen_engine(run, world)
        engines.assign_full(engine, run, world, weights)
        for chunk in engine.model.routed_chunks():
            for number, layer in zip(chunk.numbers, chunk.routed_layers(), strict=True):
                layer.mlp.register_forward_pre_hook(
                    lambda _, given, n=number: rows.setdefault(n, len(given[0])) and None
                )
        decoder = Decoder(engine, run, RoutePlan(table))
        with patch.object(RoutePlan, "trailing", RoutePlan.trailing if skips else range(0)):
            answers = decoder.continue_prompts(prompts, new_tokens, frozenset(), choose, pad=0)
        return answers, logits, rows
