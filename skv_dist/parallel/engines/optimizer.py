"""AdamW as the engines need it: a step can be skipped, and what a step does with gradients can be replaced."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from skv_dist.config.train import OptimizerConfig

Update = Callable[[torch.Tensor, torch.Tensor], None]


class GuardedAdamW(torch.optim.AdamW):
    """AdamW (decoupled weight decay, Loshchilov and Hutter, arXiv 1711.05101) that can be told to skip an update.

    ZeRO optimizers compute the gradient norm inside their step, just before they call this one: it is the last place
    where a bad step can be stopped on all ranks alike, with gradients cleared as after any other.

    Attributes:
        skip_update: asked at each step.
        update: called as ``update(weight, gradient)`` for each parameter in place of AdamW's update, where it is set.
        grad_scale, found_inf: read by a fused step (see `torch.amp.GradScaler`): what gradients are divided by, and 1.0
            to skip the update.
    """

    skip_update: Callable[[], bool] = staticmethod(lambda: False)
    update: Update | None = None
    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        if self.skip_update():
            return None
        if self.update is None:
            return super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        scale = 1.0 if self.grad_scale is None else self.grad_scale
                        self.update(weight, weight.grad / scale)
        return None


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
