"""ZeRO stages 1 to 3 through torch's ``fully_shard``: every stage with every pipeline."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.model.megatron_config import DTYPES
from skv_dist.parallel.engines.base import Piece, Quantity
from skv_dist.parallel.engines.fully_sharded import FullySharded, local_rows
from skv_dist.parallel.engines.gradient_sums import Gradients
from skv_dist.parallel.engines.masters import MasterEngine
from skv_dist.parallel.engines.optimizer import build_optimizer
from skv_dist.parallel.engines.tied import TiedHead
from skv_dist.parallel.initial_values import local_initial_values


class FsdpEngine(MasterEngine):
    """A master is this rank's rows of a parameter: AdamW updates them where FSDP gathers them from."""

    forward_is_collective = True

    def __init__(self, run: RunConfig, device: torch.device, *, initialize: bool) -> None:
        self._sharded = FullySharded(run, device, learns=True)
        self.model = self._sharded.model
        self._reduces_late = run.parallel.zero_stage == 1
        self._clip = run.optimizer.clip_grad_norm
        self._tensor_group = parallel_state.get_tensor_model_parallel_group()
        self._norm_groups = [parallel_state.get_model_parallel_group(), parallel_state.get_data_parallel_group()]
        self.unset = set() if initialize else set(self.model.parameters())
        named = list(self.model.trainable())
        self._master_of = {parameter: torch.nn.Parameter(local_rows(parameter)) for _, parameter in named}
        self._partial = [parameter for name, parameter in named if name in self._sharded.partial]
        for parameter, value in local_initial_values(run, self.model) if initialize else ():
            self._write(parameter, Quantity.WEIGHT, value)
        masters = iter([(name, self._master_of[parameter]) for name, parameter in named])
        self.optimizer = build_optimizer(masters, run.optimizer, fused=True)
        dtype = DTYPES[run.train.precision]
        self.tied = TiedHead(self.model, run, lambda weight: self._sharded.whole(weight, local_rows(weight).to(dtype)))
        self.tied.refresh()

    def _call(self, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        return self._sharded.call(function, *args)

    def _take_gradients(self) -> Gradients:
        if self._reduces_late:
            self._sharded.reduce()
        gradients: dict[torch.Tensor, torch.Tensor] = {}
        for parameter, master in self._master_of.items():
            gradients[parameter] = torch.zeros_like(master) if parameter.grad is None else local_rows(parameter.grad)
            parameter.grad = None
        self._sum_over_tensor_ranks([gradients[parameter] for parameter in self._partial])
        return gradients

    def _sum_over_tensor_ranks(self, gradients: list[torch.Tensor]) -> None:
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=self._tensor_group)
            summed = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(to) for part, to in zip(summed, gradients)])

    def _apply(self, gradients: Gradients, scale: torch.Tensor, applied: torch.Tensor) -> None:
        self._fused_step(gradients, scale, applied)
        self._sharded.reshard()

    def _rows(self, parameter: torch.nn.Parameter, quantity: Quantity) -> torch.Tensor:
        """This rank's rows of a value; a frozen parameter has only its weight."""
        return self._stored(parameter, quantity).detach() if parameter.requires_grad else local_rows(parameter)

    def read(self, parameter: torch.nn.Parameter, quantity: Quantity) -> torch.Tensor:
        return self._sharded.whole(parameter, self._rows(parameter, quantity)).float()

    def own_piece(self, parameter: torch.nn.Parameter, quantity: Quantity) -> Piece:
        return Piece(self._sharded.begin(parameter), self._rows(parameter, quantity).float().flatten())

    @torch.no_grad()
    def _write(self, parameter: torch.nn.Parameter, quantity: Quantity, value: torch.Tensor) -> None:
        if parameter.requires_grad or quantity is Quantity.WEIGHT:
            self._sharded.set_rows(parameter, self._rows(parameter, quantity), value)
