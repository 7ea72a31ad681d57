"""The update of engines that keep fp32 masters of their own: norm, clipping and AdamW, all on the device."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.parallel.engines.base import Engine, Quantity, StepOutcome
from skv_dist.parallel.engines.gradient_sums import Gradients


class MasterEngine(Engine):
    """Has an fp32 weight ("master") for each parameter that learns. Nothing in a step waits for the device.

    Attributes:
        _master_of: the master of each such parameter, or of this rank's piece of it.
        _clip: see `set_clip_grad_norm`.
        _norm_groups: process groups over whose ranks together parameters are spread.
    """

    _master_of: dict[torch.nn.Parameter, torch.nn.Parameter]
    _clip: float
    _norm_groups: Sequence[dist.ProcessGroup]

    @abstractmethod
    def _take_gradients(self) -> Gradients:
        """The gradients of the batch by parameter, each of its master's shape, reduced. The next batch begins anew."""

    @abstractmethod
    def _apply(self, gradients: Gradients, scale: torch.Tensor, applied: torch.Tensor) -> None:
        """Update with gradients divided by ``scale``, where ``applied``; both scalars on the device."""

    def set_clip_grad_norm(self, limit: float) -> None:
        self._clip = limit

    @torch.no_grad()
    def _update(self, skip_update: torch.Tensor | bool) -> StepOutcome:
        gradients = self._take_gradients()
        norm = self._norm(gradients)
        applied = norm.isfinite() & ~torch.as_tensor(skip_update, device=norm.device)
        scale = torch.ones_like(norm) if self._clip <= 0 else ((norm + 1e-6) / self._clip).clamp(min=1.0)
        self._apply(gradients, scale, applied)
        return StepOutcome(norm, applied)

    def _norm(self, gradients: Gradients) -> torch.Tensor:
        # A parameter counts once: on every tensor-parallel rank where it is split, else on the first.
        is_first = parallel_state.get_tensor_model_parallel_rank() == 0
        counted = [p for p in self._master_of if is_first or p.tensor_model_parallel]  # type: ignore[attr-defined]
        # torch's `get_total_norm` would round each parameter's norm to the dtype of its gradient.
        norms = torch._foreach_norm([gradients[parameter] for parameter in counted], dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        spread = [group for group in self._norm_groups if group.size() > 1]
        if spread:
            norm.square_()
            for group in spread:
                dist.all_reduce(norm, group=group)
            norm.sqrt_()
        return norm

    def _fused_step(self, gradients: Gradients, scale: torch.Tensor, applied: torch.Tensor) -> None:
        """`_apply` to the masters, through AdamW's fused kernel."""
        for parameter, master in self._master_of.items():
            master.grad = gradients[parameter]
        # As torch's GradScaler tells a fused optimizer, on the device, to divide gradients and to skip an update.
        self.optimizer.grad_scale, self.optimizer.found_inf = scale, (~applied).float()
        self.optimizer.step()
        for master in self._master_of.values():
            master.grad = None

    def _masters(self) -> Sequence[torch.Tensor]:
        return list(self._master_of.values())

    def _stored(self, parameter: torch.nn.Parameter, quantity: Quantity) -> torch.Tensor:
        """Where a value of a parameter that learns lies: of the shape of its master."""
        master = self._master_of[parameter]
        return master if quantity is Quantity.WEIGHT else self.optimizer.state[master][quantity.value]
