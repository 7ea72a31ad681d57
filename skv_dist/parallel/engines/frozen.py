"""A model without optimizer, for evaluation."""

from collections.abc import Sequence

import torch

from skv_dist.config.run import RunConfig
from skv_dist.parallel.engines.base import Engine, Quantity, StepOutcome
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
