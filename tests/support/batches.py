"""Batches of random tokens, the same for every layout."""

from typing import Any

import numpy as np

from tests.support.settings import GLOBAL_BATCH, SEQUENCE, VOCAB


def global_batch(step: int, reset_attention: bool = False, size: int = 2) -> list[Any]:
    """The micro-batches of one step, of ``size`` samples each. Some predictions do not count, unevenly."""
    from skv_dist.data.batches import collate
    from skv_dist.data.packing import Sample

    rng = np.random.default_rng(step)
    batches = []
    for index in range(GLOBAL_BATCH // size):
        samples = []
        for _ in range(size):
            tokens = rng.integers(0, VOCAB, SEQUENCE + 1)
            boundary = int(rng.integers(1, SEQUENCE))
            samples.append(Sample(tokens, (np.arange(SEQUENCE + 1) >= boundary).astype(np.int64)))
        batch = collate(index, samples, reset_attention)
        batch.loss_mask[0, : 2 * index] = 0
        batches.append(batch)
    return batches


def local_batches(run: Any, world: Any, step: int) -> list[Any]:
    """Those of a step that fall to this replica."""
    batches = global_batch(step, run.data.reset_attention, run.train.micro_batch_size)
    return [batch for batch in batches if batch.index % world.data_size == world.data_rank]
