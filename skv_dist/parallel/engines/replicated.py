"""Data parallelism in which every replica holds everything: ZeRO stage 0, and 1 and 2 with a single replica.

DeepSpeed has no stage 0 for bf16 parameters with fp32 accumulation ("unsupported mix"), and at stage 0 it refuses a
backward that it did not start itself, as pipeline schedules need. Plain data parallelism is small enough to write, and
one replica has nothing to shard.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.parallel.engines.base import MODEL, Engine, StepOutcome, build_optimizer
from skv_dist.parallel.engines.compiled_adamw import CompiledAdamW
from skv_dist.parallel.engines.tied import TiedHead
from skv_dist.parallel.local_model import build_root, local_initial_values


class ReplicatedEngine(Engine):
    """fp32 masters, and gradients summed in fp32. Nothing in a step waits for the device."""

    def __init__(self, run: RunConfig, vocab_size: int, device: torch.device) -> None:
        self.root = build_root(run, vocab_size, device)
        self._clip = run.optimizer.clip_grad_norm
        self._bucket = run.parallel.zero_bucket_mb * 2**20 // 4
        self._data_group = parallel_state.get_data_parallel_group()
        self._model_group = parallel_state.get_model_parallel_group()
        named = list(self.root.named())
        self._parameters = [parameter for _, parameter in named]
        with torch.no_grad():
            for parameter, value in local_initial_values(run, self.root, vocab_size):
                parameter.copy_(value)
        # The gradient of a batch: of the first micro-batch as it came, then the sum in `_buffer`, which is there from
        # the second micro-batch, or else an update that needs it, to the end of the update.
        self._first: dict[torch.Tensor, torch.Tensor] = {}
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        self._summed: set[torch.Tensor] = set()
        self._buffer = torch.empty(0)
        self._master_of: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for parameter in self._parameters:
            same = parameter.dtype == torch.float32
            self._master_of[parameter] = parameter if same else torch.nn.Parameter(parameter.detach().float())
            parameter.register_post_accumulate_grad_hook(self._accumulate)
        masters = iter([(name, self._master_of[parameter]) for name, parameter in named])
        self.optimizer = build_optimizer(masters, run.optimizer, fused=True)
        self._compiled: CompiledAdamW | None = None
        if run.train.compile:
            self._compiled = CompiledAdamW(self.optimizer, [(name, self._master_of[p], p) for name, p in named])
        counted = parallel_state.get_tensor_model_parallel_rank() == 0
        self.tied = TiedHead(self.root)
        self.tied.refresh()
        self._normed = [p for p in self._parameters if counted or p.tensor_model_parallel]  # type: ignore[attr-defined]

    @torch.no_grad()
    def _accumulate(self, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if parameter in self._summed:
            self._sums[parameter].add_(gradient)
        elif parameter in self._first:
            self._allocate()
            self._sums[parameter].copy_(self._first.pop(parameter)).add_(gradient)
            self._summed.add(parameter)
        else:
            self._first[parameter] = gradient

    def _allocate(self) -> None:
        if not self._sums:
            sizes = [parameter.numel() for parameter in self._parameters]
            self._buffer = torch.empty(sum(sizes), device=self._parameters[0].device)
            views = self._buffer.split(sizes)
            self._sums = {p: view.view_as(p) for p, view in zip(self._parameters, views)}

    def forward(self, chunk: int | None, *args: Any) -> torch.Tensor:
        return self.root(chunk, *args)

    def _gradients(self) -> Mapping[torch.Tensor, torch.Tensor]:
        """The whole batch's gradient of each parameter: in its own dtype where nothing had to be added, else fp32."""
        as_they_came = self._compiled is not None and not self._sums and self._data_group.size() == 1
        if as_they_came:
            for parameter in self._parameters:
                if parameter not in self._first:
                    self._first[parameter] = torch.zeros_like(parameter)
            return self._first
        self._reduce()
        return self._sums

    def _reduce(self) -> None:
        self._allocate()
        if self._first:
            torch._foreach_copy_([self._sums[p] for p in self._first], list(self._first.values()))
        for parameter in self._parameters:
            if parameter not in self._first and parameter not in self._summed:
                self._sums[parameter].zero_()
        if self._data_group.size() > 1:
            for part in self._buffer.split(self._bucket):
                dist.all_reduce(part, group=self._data_group)
            self._buffer.div_(self._data_group.size())

    def _norm(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        # torch's `get_total_norm` would round each parameter's norm to the dtype of its gradient.
        norms = torch._foreach_norm([gradients[parameter] for parameter in self._normed], dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if self._model_group.size() > 1:
            norm.square_()
            dist.all_reduce(norm, group=self._model_group)
            norm.sqrt_()
        return norm

    @torch.no_grad()
    def _update(self, leave_out: torch.Tensor | bool) -> StepOutcome:
        gradients = self._gradients()
        norm = self._norm(gradients)
        applied = norm.isfinite() & ~torch.as_tensor(leave_out, device=norm.device)
        scale = torch.ones_like(norm) if self._clip <= 0 else ((norm + 1e-6) / self._clip).clamp(min=1.0)
        if self._compiled is not None:
            self.prepare_moments()
            self._compiled.step(gradients, scale, applied)
        else:
            self._fused_step(gradients, scale, applied)
        self._first, self._sums, self._summed, self._buffer = {}, {}, set(), torch.empty(0)
        return StepOutcome(norm, applied)

    def _fused_step(
        self, gradients: Mapping[torch.Tensor, torch.Tensor], scale: torch.Tensor, applied: torch.Tensor
    ) -> None:
        for parameter, master in self._master_of.items():
            master.grad = gradients[parameter]
        # As torch's GradScaler tells a fused optimizer, on the device, to divide gradients and to leave a step out.
        self.optimizer.grad_scale, self.optimizer.found_inf = scale, (~applied).float()
        self.optimizer.step()
        for master in self._master_of.values():
            master.grad = None
        copied: list[torch.Tensor] = [p for p, master in self._master_of.items() if master is not p]
        if copied:
            torch._foreach_copy_(copied, [self._master_of[p] for p in copied])  # type: ignore[index]

    def _masters(self) -> Sequence[torch.Tensor]:
        return list(self._master_of.values())

    def _held(self, parameter: torch.nn.Parameter, what: str) -> torch.Tensor:
        master = self._master_of[parameter]
        return master if what == MODEL else self.optimizer.state[master][what]

    def read(self, parameter: torch.nn.Parameter, what: str) -> torch.Tensor:
        return self._held(parameter, what).detach()

    @torch.no_grad()
    def write(self, parameter: torch.nn.Parameter, what: str, value: torch.Tensor) -> None:
        self._held(parameter, what).copy_(value)
        if what == MODEL:
            parameter.copy_(value)
