"""AdamW in one pass over memory, compiled.

torch's fused AdamW wants gradients in the dtype of the masters and knows of no working copies in bf16: both cost a pass
of their own, and a buffer. Here one kernel per parameter reads the gradient as it came and writes all four.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch

from skv_dist.parallel.engines.base import MOMENTS
from skv_dist.parallel.engines.gradient_sums import Gradients
from skv_dist.parallel.engines.optimizer import GuardedAdamW, Update

Named = tuple[str, torch.nn.Parameter, torch.nn.Parameter]


class CompiledAdamW:
    """Makes the updates of a `GuardedAdamW`, whose settings and state it uses.

    Args:
        optimizer: over the masters, fused, with its state made (`Engine.prepare_moments`).
        named: name, master (float32) and working copy of each parameter; the copy may be the master itself.
    """

    def __init__(self, optimizer: GuardedAdamW, named: Sequence[Named]) -> None:
        self._optimizer = optimizer
        # Layers look alike: one graph serves them all, and a call updates a whole layer.
        self._layers = [list(layer) for _, layer in groupby(named, lambda entry: _layer(entry[0]))]
        self._decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        self._update_: Callable[..., None] = torch.compile(_update_, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(self, gradients: Gradients, scale: torch.Tensor, applied: torch.Tensor) -> None:
        """One update. Nothing waits for the device.

        Args:
            gradients: by working copy, of its shape and any dtype.
            scale: float32 scalar by which gradients are divided.
            applied: bool scalar; False leaves everything as it is.
        """
        if self._optimizer.update is not None:
            self._replaced_step(self._optimizer.update, gradients, scale)
            return
        group, state = self._optimizer.param_groups[0], self._optimizer.state
        count = state[self._layers[0][0][1]]["step"].double() + 1
        lr = torch.full((), group["lr"], device=scale.device)
        corrections = [(1 - beta**count).float() for beta in group["betas"]]
        for layer in self._layers:
            masters = [master for _, master, _ in layer]
            self._update_(
                masters,
                [None if copy is master else copy for _, master, copy in layer],
                [gradients[copy] for _, _, copy in layer],
                *([state[master][name] for master in masters] for name in MOMENTS),
                [self._decay[master] for master in masters],
                group["betas"],
                group["eps"],
                lr,
                corrections,
                scale,
                applied,
            )
        counts = [entry["step"] for entry in state.values()]
        torch._foreach_add_(counts, [applied.float()] * len(counts))  # a lone scalar tensor would be read by the host

    def _replaced_step(self, update: Update, gradients: Gradients, scale: torch.Tensor) -> None:
        for layer in self._layers:
            for _, master, copy in layer:
                update(master, gradients[copy].float() / scale)
                copy.copy_(master)


def _layer(name: str) -> str:
    """``layers.17`` of ``layers.17.mlp.linear_fc1.weight``; other names as they are."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name


def _update_(
    masters: Sequence[torch.Tensor],
    copies: Sequence[torch.Tensor | None],
    gradients: Sequence[torch.Tensor],
    averages: Sequence[torch.Tensor],
    squares: Sequence[torch.Tensor],
    decays: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    lr: torch.Tensor,
    corrections: Sequence[torch.Tensor],
    scale: torch.Tensor,
    applied: torch.Tensor,
) -> None:
    """Algorithm 2 of Loshchilov and Hutter (arXiv 1711.05101), in the order of operations of torch's fused kernel."""
    entries = zip(masters, copies, gradients, averages, squares, decays)
    for master, copy, gradient, average, square, decay in entries:
        gradient = gradient.float() / scale
        new_average = torch.lerp(average, gradient, 1 - betas[0])
        new_square = betas[1] * square + (1 - betas[1]) * gradient * gradient
        denominator = new_square.sqrt() / corrections[1].sqrt() + eps
        new_master = master - lr * decay * master
        new_master = new_master - lr / corrections[0] * new_average / denominator
        for old, new in ((master, new_master), (average, new_average), (square, new_square)):
            old.copy_(torch.where(applied, new, old))
        if copy is not None:
            copy.copy_(master)
