"""Losses of single sequences, the same on all ranks: what a search compares maps by."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.data.batches import MicroBatch
from skv_dist.evaluation.search.measured import Table
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.run_batch import count_predictions, run_batch
from skv_dist.routing import RoutePlan


class SequenceLosses:
    """The summed loss of each sequence of some micro-batches under a map. Collective.

    Args:
        batches: this replica's, on the device.
    """

    def __init__(self, engine: Engine, run: RunConfig, batches: Sequence[MicroBatch]) -> None:
        self._engine, self._run, self._batches = engine, run, batches
        self._num_predictions = count_predictions(batches)
        counts = _over_replicas(torch.cat([batch.loss_mask.sum(dim=-1) for batch in batches]))
        self._counted = counts > 0  # micro-batches are filled up with samples that do not count
        self.counts = counts[self._counted]
        """Predictions that count in each sequence, float64 [n]."""

    def __call__(self, table: Table) -> np.ndarray:
        """float64 [n]."""
        plans = [RoutePlan(table)] * len(self._batches)
        outcome = run_batch(
            self._engine, self._run, self._batches, plans, num_predictions=self._num_predictions, train=False
        )
        group = parallel_state.get_pipeline_model_parallel_group()
        last = group.size() - 1
        if parallel_state.get_pipeline_model_parallel_rank() == last:
            sums = torch.cat(outcome.sums)
        else:
            sums = torch.empty(sum(batch.tokens.shape[0] for batch in self._batches), device=outcome.loss.device)
        if last:
            dist.broadcast(sums, dist.get_global_rank(group, last), group=group)
        return _over_replicas(sums)[self._counted]


def _over_replicas(values: torch.Tensor) -> np.ndarray:
    """The values [m] of all replicas, one behind the other: float64 [replicas * m]."""
    group = parallel_state.get_data_parallel_group()
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts).double().cpu().numpy()
