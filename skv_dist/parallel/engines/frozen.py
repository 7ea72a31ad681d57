"""A model without optimizer, for evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from skv_dist.config.run import RunConfig
from skv_dist.parallel.engines.base import Engine, Quantity, StepOutcome
from skv_dist.parallel.engines.fully_sharded import FullySharded, local_rows
from skv_dist.parallel.engines.tied import TiedHead
from skv_dist.parallel.local_model import build_local_model


class FrozenEngine(Engine):
    """Holds weights in the run's precision and nothing else."""

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        self.model = build_local_model(run, device)
        self.model.requires_grad_(False)
        self.model.eval()
        self.unset = set(self.model.parameters())
        self.tied = TiedHead(self.model, run)

    def _update(self, skip_update: torch.Tensor | bool) -> StepOutcome:
        raise NotImplementedError("a frozen model does not learn")

    def set_clip_grad_norm(self, limit: float) -> None:
        raise NotImplementedError("a frozen model has no gradients")

    def read(self, parameter: torch.nn.Parameter, quantity: Quantity) -> torch.Tensor:
        return parameter.detach().float()

    @torch.no_grad()
    def _write(self, parameter: torch.nn.Parameter, quantity: Quantity, value: torch.Tensor) -> None:
        parameter.copy_(value)

    def _masters(self) -> Sequence[torch.Tensor]:
        return []


class ShardedFrozenEngine(FrozenEngine):
    """Shares its weights out over the replicas, and gathers them layer by layer."""

    forward_is_collective = True

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        self._sharded = FullySharded(run, device, learns=False)
        self.model = self._sharded.model
        self.model.eval()
        self.unset = set(self.model.parameters())
        self.tied = TiedHead(self.model, run, lambda weight: self._sharded.whole(weight, local_rows(weight)))

    def _call(self, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        return self._sharded.call(function, *args)

    def read(self, parameter: torch.nn.Parameter, quantity: Quantity) -> torch.Tensor:
        return self._sharded.whole(parameter, local_rows(parameter)).float()

    @torch.no_grad()
    def _write(self, parameter: torch.nn.Parameter, quantity: Quantity, value: torch.Tensor) -> None:
        self._sharded.set_rows(parameter, local_rows(parameter), value)
