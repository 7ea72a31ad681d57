"""A model without optimizer, for evaluation."""

from collections.abc import Sequence
from typing import Any

import torch

from skv_dist.config.run import RunConfig
from skv_dist.parallel.engines.base import Engine, StepOutcome
from skv_dist.parallel.engines.tied import TiedHead
from skv_dist.parallel.local_model import build_root


class FrozenEngine(Engine):
    """Holds weights in the run's precision and nothing else."""

    def __init__(self, run: RunConfig, vocab_size: int, device: torch.device) -> None:
        self.root = build_root(run, vocab_size, device)
        self.root.requires_grad_(False)
        self.root.eval()
        self.tied = TiedHead(self.root)

    def forward(self, chunk: int | None, *args: Any) -> torch.Tensor:
        return self.root(chunk, *args)

    def _update(self, leave_out: torch.Tensor | bool) -> StepOutcome:
        raise NotImplementedError("a frozen model does not learn")

    def read(self, parameter: torch.nn.Parameter, what: str) -> torch.Tensor:
        return parameter.detach().float()

    @torch.no_grad()
    def write(self, parameter: torch.nn.Parameter, what: str, value: torch.Tensor) -> None:
        parameter.copy_(value)

    def _masters(self) -> Sequence[torch.Tensor]:
        return []
