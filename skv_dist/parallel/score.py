"""How likely a model finds given tokens, in any layout."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from skv_dist.config.run import RunConfig
from skv_dist.model.cross_entropy import blocks_of
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.forward import Forward
from skv_dist.routing import RoutePlan


class Target(NamedTuple):
    """What follows the last positions of an input.

    Attributes:
        row: the input.
        labels: tokens that its last ``len(labels)`` positions predict.
    """

    row: int
    labels: Sequence[int]


class Likelihood(NamedTuple):
    """Of the labels of a `Target`.

    Attributes:
        log_prob: natural logarithm of their joint probability.
        is_greedy: each of them is the likeliest token.
    """

    log_prob: float
    is_greedy: bool


class Scorer:
    """Scores tokens under one sharing map."""

    def __init__(self, engine: Engine, run: RunConfig, plan: RoutePlan) -> None:
        self._forward = Forward(engine, run, plan)
        self._device = engine.model.device
        self._vocab_size = run.vocab_size

    @torch.no_grad()
    def score(self, inputs: Sequence[Sequence[int]], targets: Sequence[Target]) -> list[Likelihood]:
        """Collective over this replica's ranks, which all pass the same and get the same.

        Args:
            inputs: token ids, none empty; one batch.
            targets: none with more labels than its input has tokens.
        """
        tokens = torch.zeros(len(inputs), max(map(len, inputs)), dtype=torch.int64)
        for row, ids in enumerate(inputs):
            tokens[row, : len(ids)] = torch.tensor(list(ids))  # nothing attends to what is behind
        logits = self._forward.logits(tokens.to(self._device), gather=False)  # [s, b, v]
        found = torch.zeros(len(targets), 2, dtype=torch.float64, device=self._device)
        if logits is not None:
            found = self._measure(logits, [len(ids) for ids in inputs], targets)
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() > 1:
            dist.broadcast(found, dist.get_global_rank(group, group.size() - 1), group=group)
        return [Likelihood(log_prob, wrong == 0) for log_prob, wrong in found.tolist()]

    def _measure(self, logits: torch.Tensor, lengths: Sequence[int], targets: Sequence[Target]) -> torch.Tensor:
        """logits [s, b, v] -> of each target the sum of log-probabilities, and how many labels are not the likeliest
        token: float64 [targets, 2]."""
        batch = logits.shape[1]
        places: list[int] = []
        labels: list[int] = []
        owners: list[int] = []
        for number, (row, following) in enumerate(targets):
            first = lengths[row] - len(following)
            places += [position * batch + row for position in range(first, lengths[row])]
            labels += following
            owners += [number] * len(following)
        label, owner, place = torch.tensor([labels, owners, places], dtype=torch.int64, device=self._device)  # [n] each
        rows = logits.flatten(0, 1)  # [s, b, v] -> [s * b, v]
        parts = []
        size = len(blocks_of(rows, compiled=False)[0])  # of a block, which alone exists in float32
        group = parallel_state.get_tensor_model_parallel_group()
        for where, right in zip(place.split(size), label.split(size)):
            whole = tensor_parallel.gather_from_tensor_model_parallel_region(rows[where], group=group)
            log_probs = whole[:, : self._vocab_size].float().log_softmax(-1)  # [m, V]
            wrong = log_probs.argmax(-1) != right
            parts.append(torch.stack([log_probs.gather(1, right[:, None])[:, 0], wrong.float()], -1))  # [m, 2]
        found = torch.zeros(len(targets), 2, dtype=torch.float64, device=self._device)
        return found.index_add_(0, owner, torch.cat(parts).double()) if parts else found
