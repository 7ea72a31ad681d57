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

FEWEST = 8  # sequences in the first part: the error of a difference must be worth something


def shares_prefixes(run: RunConfig) -> bool:
    """Whether layers that maps agree on run once for all of them: where each rank holds (its part of) all layers.

    Pipeline stages measure one map after the other, through the schedule of a training step.
    """
    return run.parallel.pipeline == 1


class SequenceLosses:
    """The summed loss of each sequence of some micro-batches under maps. Collective.

    The sequences come in parts: a few, then as many again as came before, until none is left.

    Args:
        batches: this replica's, on the device.
    """

    def __init__(self, engine: Engine, run: RunConfig, batches: Sequence[MicroBatch]) -> None:
        self._engine, self._run = engine, run
        self._num_predictions = count_predictions(batches)
        group = run.parallel.pipeline if run.parallel.virtual_pipeline > 1 else 1  # what the interleaved schedule takes
        together = batches[0].loss_mask.shape[0] * parallel_state.get_data_parallel_world_size() * group
        ends = _doubling(len(batches), group * -(-FEWEST // together))
        self._parts = [batches[begin:end] for begin, end in zip([0, *ends], ends)]
        counts = [_over_replicas(torch.cat([batch.loss_mask.sum(dim=-1) for batch in part])) for part in self._parts]
        self._counted = [part > 0 for part in counts]  # micro-batches are filled up with samples that do not count
        self.counts = [part[counted] for part, counted in zip(counts, self._counted)]
        """Predictions that count in each sequence of each part, float64 [n]."""

    def __call__(self, tables: Sequence[Table], part: int) -> list[np.ndarray]:
        """Of each map, float64 [n]."""
        plans, batches = [RoutePlan(table) for table in tables], self._parts[part]
        if shares_prefixes(self._run):
            sums = torch.cat([self._engine.forward_plans(plans, batch) for batch in batches], dim=-1)
        else:
            sums = torch.stack([self._alone(plan, batches) for plan in plans])
        return list(_over_replicas(sums)[:, self._counted[part]])

    def _alone(self, plan: RoutePlan, batches: Sequence[MicroBatch]) -> torch.Tensor:
        """The sums of this replica's sequences under one map, [m]."""
        plans = [plan] * len(batches)
        outcome = run_batch(self._engine, self._run, batches, plans, num_predictions=self._num_predictions, train=False)
        group = parallel_state.get_pipeline_model_parallel_group()
        last = group.size() - 1
        if parallel_state.get_pipeline_model_parallel_rank() == last:
            sums = torch.cat(outcome.sums)
        else:
            sums = torch.empty(sum(batch.tokens.shape[0] for batch in batches), device=outcome.loss.device)
        if last:
            dist.broadcast(sums, dist.get_global_rank(group, last), group=group)
        return sums


def _doubling(whole: int, first: int) -> list[int]:
    """``first``, twice that, and so on, up to the whole."""
    ends = [min(first, whole)]
    while ends[-1] < whole:
        ends.append(min(2 * ends[-1], whole))
    return ends


def _over_replicas(values: torch.Tensor) -> np.ndarray:
    """The values [..., m] of all replicas, one behind the other: float64 [..., replicas * m]."""
    group = parallel_state.get_data_parallel_group()
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=-1).double().cpu().numpy()
