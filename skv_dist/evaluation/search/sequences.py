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


def shares_prefixes(run: RunConfig) -> bool:
    """Whether layers that maps agree on run once for all of them: where each rank holds (its part of) all layers.

    Pipeline stages measure one map after the other, through the schedule of a training step.
    """
    return run.parallel.pipeline == 1


class SequenceLosses:
    """The summed loss of each sequence of some micro-batches under maps. Collective.

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

    def __call__(self, tables: Sequence[Table]) -> list[np.ndarray]:
        """Of each map, float64 [n]."""
        plans = [RoutePlan(table) for table in tables]
        if shares_prefixes(self._run):
            sums = self._together(plans)
        else:
            sums = torch.stack([self._alone(plan) for plan in plans])
        return list(_over_replicas(sums)[:, self._counted])

    def _together(self, plans: Sequence[RoutePlan]) -> torch.Tensor:
        """The sums of this replica's sequences under each map, [plans, m]."""
        parts = [self._engine.forward_plans(plans, batch) for batch in self._batches]
        return torch.cat(parts, dim=-1)

    def _alone(self, plan: RoutePlan) -> torch.Tensor:
        """The sums of this replica's sequences under one map, [m]."""
        plans = [plan] * len(self._batches)
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
        return sums


def _over_replicas(values: torch.Tensor) -> np.ndarray:
    """The values [..., m] of all replicas, one behind the other: float64 [..., replicas * m]."""
    group = parallel_state.get_data_parallel_group()
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=-1).double().cpu().numpy()
