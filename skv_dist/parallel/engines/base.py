"""What the trainer needs of whatever owns parameters, gradients and optimizer state."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from skv_dist.config.train import OptimizerConfig
from skv_dist.parallel.engines.tied import TiedHead
from skv_dist.parallel.local_model import Root


@dataclass(frozen=True)
class StepOutcome:
    """Result of one optimizer step.

    Attributes:
        grad_norm: global L2 norm of the gradient before clipping; infinite or NaN where a gradient is.
        applied: False where the update was left out.

    Both are scalars on the device, float32 and bool, so that nobody has to wait for them.
    """

    grad_norm: torch.Tensor
    applied: torch.Tensor


class GuardedAdamW(torch.optim.AdamW):
    """AdamW (decoupled weight decay, Loshchilov and Hutter, arXiv 1711.05101) that can be told to leave a step out.

    ZeRO optimizers compute the gradient norm inside their step, just before they call this one: it is the last place
    where a bad step can be stopped on all ranks alike, with gradients cleared as after any other.
    """

    leave_out: Callable[[], bool] = staticmethod(lambda: False)
    # Read by a fused step (see `torch.amp.GradScaler`): what gradients are divided by, and 1.0 to leave the step out.
    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        return None if self.leave_out() else super().step(closure)


def build_optimizer(
    named: Iterator[tuple[str, torch.nn.Parameter]], config: OptimizerConfig, fused: bool
) -> GuardedAdamW:
    """AdamW with weight decay on matrices only: not on norms or biases."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in named:
        (plain if "norm" in name or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return GuardedAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


MODEL, MOMENTS = "model", ("exp_avg", "exp_avg_sq")  # what a parameter has: its fp32 weight, and Adam's moments


def is_valid_norm(norm: float) -> bool:
    """DeepSpeed reports a bad norm as -1 in some places, as infinity in others."""
    return math.isfinite(norm) and norm >= 0


class Engine(ABC):
    """Owns the parameters of one rank. Gradients are averaged over data-parallel replicas, accumulated in fp32."""

    root: Root
    optimizer: GuardedAdamW
    tied: TiedHead

    @abstractmethod
    def forward(self, chunk: int | None, *args: Any) -> torch.Tensor:
        """`Root.forward`, with or without gradient."""

    def step(self, leave_out: torch.Tensor | bool = False) -> StepOutcome:
        """Reduce, clip and update with all gradients since the last step, and clear them.

        Args:
            leave_out: (scalar on the device) clear the gradients without an update. Must be the same on all ranks.
        """
        outcome = self._update(leave_out)
        self.tied.refresh()
        return outcome

    def assign(self, values: Iterator[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
        """Set parameters, fp32 masters included, from this tensor-parallel rank's parts. Collective."""
        for parameter, value in values:
            self.write(parameter, MODEL, value)
        self.tied.refresh()

    def add_tied_gradient(self) -> None:
        """Add the head's gradient to that of the embedding it is tied to, where they are on different stages."""
        gradient = self.tied.gradient()
        if gradient is not None:
            self.forward(None, gradient).backward()

    @abstractmethod
    def _update(self, leave_out: torch.Tensor | bool) -> StepOutcome: ...

    @abstractmethod
    def read(self, parameter: torch.nn.Parameter, what: str) -> torch.Tensor:
        """fp32 value of this tensor-parallel rank's part. Collective over data-parallel ranks.

        Args:
            what: ``MODEL`` for the weight, or one of ``MOMENTS`` (after `prepare_moments`).
        """

    @abstractmethod
    def write(self, parameter: torch.nn.Parameter, what: str, value: torch.Tensor) -> None:
        """The inverse of `read`; of a weight also the working copy. A caller refreshes `tied` behind the last one."""

    @abstractmethod
    def _masters(self) -> Sequence[torch.Tensor]:
        """The fp32 tensors of this rank that the optimizer updates."""

    def prepare_moments(self) -> None:
        """Make Adam's state, as its first step would."""
        for master in self._masters():
            state = self.optimizer.state[master]
            if not state:
                device = master.device if self.optimizer.defaults["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for name in MOMENTS:
                    state[name] = torch.zeros_like(master, memory_format=torch.preserve_format)

    @property
    def updates(self) -> int:
        """Updates that Adam has made (after `prepare_moments`)."""
        return int(self.optimizer.state[self._masters()[0]]["step"].item())

    @updates.setter
    def updates(self, count: int) -> None:
        for master in self._masters():
            self.optimizer.state[master]["step"].fill_(float(count))

    def close(self) -> None:
        """Take hooks off the parameters. Without it an engine, with its process groups, outlives its last reference."""
        self.root.on_backward = None

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
