"""Packed examples through a model in any layout."""

from typing import Any

import numpy as np

from tests.support import engine as engines
from tests.support.engine import built, made_engine


def gradients_of_examples(
    settings: dict[str, Any],
    samples: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    table: list[int],
    fault: str | None = None,
) -> dict[str, Any] | None:
    """Loss and every gradient of one global batch under one route. Rank 0 returns them, with the initial weights.

    Args:
        samples: tokens, documents and counts of each sequence (`skv_dist.data.packing.Sample`).
        fault: name of a function in `tests.support.faults`.
    """
    from skv_dist.data.batches import micro_batches
    from skv_dist.data.packing import Sample
    from skv_dist.parallel.run_batch import count_predictions, run_batch
    from skv_dist.routing import RoutePlan
    from tests.support import faults

    with faults.applied(fault), built(settings) as (run, world), made_engine(run, world) as engine:
        engine.set_clip_grad_norm(0.0)
        size = run.train.micro_batch_size
        rounds = len(samples) // (size * world.data_size)
        given = [Sample(*sample) for sample in samples]
        batches = micro_batches(given, 0, rounds, size, world.data_rank, world.data_size, run.data.reset_attention)
        weights = engines.full_weights(engine, run)
        count = count_predictions(batches)
        outcome = run_batch(engine, run, batches, [RoutePlan(table)] * rounds, num_predictions=count, train=True)
        _, gradients = engines.capture_gradients(engine, run)
        result = {"loss": outcome.loss.item(), "gradients": gradients, "parameters": weights}
        return result if world.is_first else None
