"""Building the chunks of one rank, with weights and gradient bookkeeping that hold in every layout."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.model.chunk import RoutedChunk
from skv_dist.model.initialize import initial_value
from skv_dist.parallel.tensor_split import full_shape, kind_of, take


class Root(torch.nn.Module):
    """All chunks of this rank under one module, so that one engine owns their parameters."""

    def __init__(self, chunks: list[RoutedChunk]) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)
        self.on_backward: Callable[[], None] | None = None  # called when the backward of any forward begins

    def forward(self, index: int | None, *args: Any) -> torch.Tensor:
        """Run chunk ``index``; None: return a scalar whose gradient by the embedding is the one given (`TiedHead`)."""
        if index is None:
            first: Any = self.chunks[0]
            (gradient,) = args
            out = (first.embedding.weight * gradient).sum()
        else:
            out = self.chunks[index](*args)
        if self.on_backward is not None and out.requires_grad:
            called = self.on_backward
            out.register_hook(lambda grad: called())
        return out

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters under their global names: ``layers.17.mlp.linear_fc1.weight``, whichever chunk holds them."""
        for name, parameter in self.named_parameters():
            yield global_name(name), parameter


def global_name(name: str) -> str:
    """Name of a parameter without the parts that depend on the layout."""
    parts = name.split(".")
    return ".".join(parts[2:] if parts[0] == "chunks" else parts)


def partitioned_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Shape of this tensor-parallel rank's part, also while ZeRO-3 has it partitioned away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def build_root(run: RunConfig, vocab_size: int, device: torch.device, context: Any = None) -> Root:
    """The model of this rank on ``device``: marked, with gradient hooks, weights not yet set.

    Args:
        context: entered while modules are built (``deepspeed.zero.Init`` for ZeRO-3).
    """
    with context or contextlib.nullcontext():
        root = Root(list(_chunks(run, vocab_size)))
    if context is None:
        root.to(device)
    mark_parameters(root, run)
    add_gradient_sums(root)
    if run.train.compile:
        chunk: Any
        for chunk in root.chunks:
            chunk.compile_layers()
    return root


def _chunks(run: RunConfig, vocab_size: int) -> Iterator[RoutedChunk]:
    stage, size = parallel_state.get_pipeline_model_parallel_rank(), run.parallel.pipeline
    for number, layers in enumerate(run.stages[stage::size]):
        chunk = RoutedChunk(run, vocab_size, layers.start, layers.stop)
        if run.parallel.virtual_pipeline > 1:
            chunk.vp_stage = number
        yield chunk


def mark_parameters(root: Root, run: RunConfig) -> None:
    """Say of each parameter whether tensor-parallel ranks hold different parts of it.

    The gradient norm counts a parameter once: on every rank where it is split, else on the first. Megatron sets this
    mark only together with its own initialization, which we do not use.
    """
    for name, parameter in root.named():
        parameter.tensor_model_parallel = kind_of(name, run.model.gated) != "replicated"  # type: ignore[attr-defined]


def add_gradient_sums(root: Root) -> None:
    """Sum over tensor-parallel ranks the gradients of replicated parameters that each rank sees only a part of.

    These are the parameters that sequence parallelism shows a part of the positions, and q/k-norms, which see this
    rank's heads only. DeepSpeed does neither; one hook per parameter suits every ZeRO stage (RECIPE.md).
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return

    def summed(grad: torch.Tensor) -> torch.Tensor:
        total = grad.float()
        if total is grad:
            total = grad.clone()  # autograd may share a gradient among several users
        dist.all_reduce(total, group=group)
        return total.to(grad.dtype)

    for name, parameter in root.named():
        sees_part = "q_layernorm" in name or "k_layernorm" in name
        if sees_part or getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(summed)


def local_initial_values(
    run: RunConfig, root: Root, vocab_size: int
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each parameter with its initial value on this rank, one at a time, float32 on the CPU."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in root.named():
        local = partitioned_shape(parameter)
        kind = kind_of(name, run.model.gated)
        full = initial_value(name, full_shape(local, kind, size, vocab_size), run.model, run.train.seed)
        yield parameter, take(full, kind, rank, size, local)
