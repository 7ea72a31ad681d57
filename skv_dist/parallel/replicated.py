"""ZeRO stage 0: every replica holds everything.

DeepSpeed has no stage 0 for bf16 parameters with fp32 accumulation ("unsupported mix"), and at stage 0 it refuses a
backward that it did not start itself, as pipeline schedules need. Plain data parallelism is small enough to write.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.parallel.build import build_root, local_initial_values
from skv_dist.parallel.engine import MODEL, Engine, StepOutcome, build_optimizer, is_valid_norm
from skv_dist.parallel.tied import TiedHead


class ReplicatedEngine(Engine):
    """Data parallelism with fp32 masters and one flat fp32 gradient buffer."""

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
        self._buffer = torch.zeros(sum(p.numel() for p in self._parameters), device=device)
        sizes = [p.numel() for p in self._parameters]
        views = [v.view_as(p) for v, p in zip(self._buffer.split(sizes), self._parameters)]
        self._gradients = dict(zip(self._parameters, views))
        self._master_of: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for parameter in self._parameters:
            if parameter.dtype == torch.float32:
                parameter.grad = self._gradients[parameter]  # autograd adds to it in place
                self._master_of[parameter] = parameter
            else:
                self._master_of[parameter] = torch.nn.Parameter(parameter.detach().float())
                parameter.register_post_accumulate_grad_hook(self._accumulate)
        masters = iter([(name, self._master_of[parameter]) for name, parameter in named])
        self.optimizer = build_optimizer(masters, run.optimizer, device.type == "cuda")
        counted = parallel_state.get_tensor_model_parallel_rank() == 0
        self.tied = TiedHead(self.root)
        self.tied.refresh()
        self._normed = [
            self._gradients[p] for p in self._parameters if counted or p.tensor_model_parallel  # type: ignore[attr-defined]
        ]

    def _accumulate(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._gradients[parameter].add_(parameter.grad)  # type: ignore[index]
        parameter.grad = None

    def forward(self, chunk: int | None, *args: Any) -> torch.Tensor:
        return self.root(chunk, *args)

    @torch.no_grad()
    def _reduce(self) -> None:
        if self._data_group.size() > 1:
            for part in self._buffer.split(self._bucket):
                dist.all_reduce(part, group=self._data_group)
            self._buffer.div_(self._data_group.size())

    @torch.no_grad()
    def _update(self, leave_out: bool) -> StepOutcome:
        self._reduce()
        squares = torch.stack([gradient.square().sum() for gradient in self._normed]).sum()
        dist.all_reduce(squares, group=self._model_group)
        norm = squares.sqrt().item()
        applied = not leave_out and is_valid_norm(norm)
        if applied:
            if self._clip > 0 and norm > self._clip:
                self._buffer.mul_(self._clip / (norm + 1e-6))
            for parameter, master in self._master_of.items():
                master.grad = self._gradients[parameter]
            self.optimizer.step()
            for parameter, master in self._master_of.items():
                if master is not parameter:
                    parameter.copy_(master)
        self._buffer.zero_()
        return StepOutcome(norm, applied)

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
