"""Data parallelism in which every replica holds everything: ZeRO stage 0, and 1 and 2 with a single replica.

DeepSpeed has no stage 0 for bf16 parameters with fp32 accumulation ("unsupported mix"), and at stage 0 it refuses a
backward that it did not start itself, as pipeline schedules need. Plain data parallelism is small enough to write, and
one replica has nothing to shard.
"""

import torch
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.parallel.engines.base import Quantity
from skv_dist.parallel.engines.compiled_adamw import CompiledAdamW
from skv_dist.parallel.engines.gradient_sums import Gradients, GradientSums
from skv_dist.parallel.engines.masters import MasterEngine
from skv_dist.parallel.engines.optimizer import build_optimizer
from skv_dist.parallel.engines.tied import TiedHead
from skv_dist.parallel.initial_values import local_initial_values
from skv_dist.parallel.local_model import build_local_model


def _master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """The fp32 weight behind a parameter: a copy, or the parameter itself where it is fp32."""
    return parameter if parameter.dtype == torch.float32 else torch.nn.Parameter(parameter.detach().float())


class ReplicatedEngine(MasterEngine):
    """Gradients are summed in fp32, over micro-batches and then over replicas."""

    def __init__(self, run: RunConfig, device: torch.device, *, initialize: bool) -> None:
        self.model = build_local_model(run, device)
        self._clip = run.optimizer.clip_grad_norm
        self._norm_groups = [parallel_state.get_model_parallel_group()]
        named = list(self.model.trainable())
        self.unset = set() if initialize else set(self.model.parameters())
        with torch.no_grad():
            for parameter, value in local_initial_values(run, self.model) if initialize else ():
                parameter.copy_(value)
        self._master_of = {parameter: _master(parameter) for _, parameter in named}
        bucket_elements = run.parallel.zero_bucket_mb * 2**20 // 4
        self._gradients = GradientSums(list(self._master_of), parallel_state.get_data_parallel_group(), bucket_elements)
        masters = iter([(name, self._master_of[parameter]) for name, parameter in named])
        self.optimizer = build_optimizer(masters, run.optimizer, fused=True)
        self._compiled: CompiledAdamW | None = None
        if run.train.compile:
            self._compiled = CompiledAdamW(self.optimizer, [(name, self._master_of[p], p) for name, p in named])
        self.tied = TiedHead(self.model, run)
        self.tied.refresh()

    def _take_gradients(self) -> Gradients:
        return self._gradients.take(any_dtype=self._compiled is not None)

    def _apply(self, gradients: Gradients, scale: torch.Tensor, applied: torch.Tensor) -> None:
        if self._compiled is not None:
            self.prepare_moments()
            self._compiled.step(gradients, scale, applied)
            return
        self._fused_step(gradients, scale, applied)
        working_copies: list[torch.Tensor] = [p for p, master in self._master_of.items() if master is not p]
        if working_copies:
            torch._foreach_copy_(working_copies, [self._master_of[p] for p in working_copies])  # type: ignore[index]

    def read(self, parameter: torch.nn.Parameter, quantity: Quantity) -> torch.Tensor:
        return self._stored(parameter, quantity).detach() if parameter.requires_grad else parameter.detach().float()

    @torch.no_grad()
    def _write(self, parameter: torch.nn.Parameter, quantity: Quantity, value: torch.Tensor) -> None:
        if parameter.requires_grad:
            self._stored(parameter, quantity).copy_(value)
        if quantity is Quantity.WEIGHT:
            parameter.copy_(value)
