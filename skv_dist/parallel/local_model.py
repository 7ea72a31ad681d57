"""The chunks of one rank as one module: built, with gradient bookkeeping that holds in every layout, and packed for
the wire."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.data.batches import MicroBatch
from skv_dist.model.adapter import add_adapters, is_adapter, plain_name
from skv_dist.model.chunk import RoutedChunk
from skv_dist.model.kv_cache import KvCache
from skv_dist.model.shared_prefix import sums_of_plans
from skv_dist.parallel.freezing import freeze
from skv_dist.parallel.tensor_split import Replicated, split_of
from skv_dist.parallel.wire.packing import Packing
from skv_dist.routing import RoutePlan


class LocalModel(torch.nn.Module):
    """All chunks of this rank under one module, so that one engine owns their parameters."""

    def __init__(self, chunks: list[RoutedChunk], packing: Packing) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)
        self._packing = packing
        self.on_backward: Callable[[], None] | None = None  # called when the backward of a forward begins

    def routed_chunks(self) -> list[RoutedChunk]:
        """The chunks, in the order of execution."""
        return cast(list[RoutedChunk], list(self.chunks))

    def forward(self, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        """``function(*args)``, where it is a method of this model.

        Every computation enters here, so that the hooks of whatever owns the parameters see all of them.
        """
        out = function(*args)
        if self.on_backward is not None and out.requires_grad:
            begins = self.on_backward
            out.register_hook(lambda grad: begins())
        return out

    def run_chunk(
        self,
        index: int,
        plan: RoutePlan,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        received: torch.Tensor | None = None,
        width: int | None = None,
        cache: KvCache | None = None,
        teacher: torch.Tensor | None = None,
        gather: bool = True,
    ) -> torch.Tensor:
        """Run chunk ``index`` between two ends of the wire.

        Args:
            plan, tokens, labels, documents, cache, teacher, gather: see `RoutedChunk.forward`.
            received: what the chunk before returned, [s/t, b, width]; None for the first.
            width: columns to pad the result to, where a chunk follows; None: as many as it needs.

        Returns:
            Of the last chunk losses or logits, as `RoutedChunk.forward` does; of the others the hidden state and the
            K/V that later chunks read, packed: [s/t, b, width].
        """
        chunk = self.routed_chunks()[index]
        hidden, live = None, None
        if received is not None:
            hidden, live = self._packing.unpack(received, plan.live_after(chunk.numbers.start - 1))
        out, live = chunk(plan, tokens, labels, documents, hidden, live, cache, teacher, gather)
        if not chunk.has_head:
            out = self._packing.pack(out, live, plan.live_after(chunk.numbers.stop - 1), width)
        return out

    def run_plans(self, plans: Sequence[RoutePlan], batch: MicroBatch) -> torch.Tensor:
        """`sums_of_plans` of the one chunk of this rank, which holds the whole model."""
        (chunk,) = self.routed_chunks()
        return sums_of_plans(chunk, plans, batch.tokens, batch.labels, batch.loss_mask, batch.documents)

    def dot_with_embedding(self, gradient: torch.Tensor) -> torch.Tensor:
        """A scalar whose gradient by the embedding's weight [v, h] is ``gradient``, of the same shape."""
        return (self.routed_chunks()[0].embedding.weight * gradient).sum()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def trainable(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Those of `named` that are not frozen."""
        return ((name, parameter) for name, parameter in self.named() if parameter.requires_grad)

    def named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters under their global names: ``layers.17.mlp.linear_fc1.weight``, whichever chunk holds them."""
        for name, parameter in self.named_parameters():
            yield global_name(name), parameter


def global_name(name: str) -> str:
    """Name of a parameter without the parts that depend on the layout."""
    parts = plain_name(name).split(".")
    return ".".join(parts[2:] if parts[0] == "chunks" else parts)


def partitioned_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Shape of this tensor-parallel rank's part, also while ZeRO-3 has it partitioned away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def build_local_model(run: RunConfig, device: torch.device, context: Any = None) -> LocalModel:
    """The model of this rank on ``device``: marked, with gradient hooks, weights not yet set.

    Args:
        run: the complete configuration; process groups must exist.
        context: entered while modules are built (``deepspeed.zero.Init`` for ZeRO-3).
    """
    stage, num_stages = parallel_state.get_pipeline_model_parallel_rank(), run.parallel.pipeline
    with context or contextlib.nullcontext():
        chunks = [RoutedChunk(run, numbers) for numbers in run.stages[stage::num_stages]]
        if run.lora.rank:
            for chunk in chunks:
                add_adapters(chunk.routed_layers(), run)
        model = LocalModel(chunks, Packing.of(run))
    if context is None:
        model.to(device)
    freeze(dict(model.named()), run)
    mark_split_parameters(model, run)
    add_gradient_sums(model, run)
    if run.train.compile:
        for chunk in chunks:
            chunk.compile_layers()
    return model


def mark_split_parameters(model: LocalModel, run: RunConfig) -> None:
    """Say of each parameter whether tensor-parallel ranks hold different parts of it.

    The gradient norm counts a parameter once: on every rank where it is split, else on the first. Megatron sets this
    mark only together with its own initialization, which we do not use.
    """
    for name, parameter in model.named():
        is_split = not isinstance(split_of(name, run), Replicated)
        parameter.tensor_model_parallel = is_split  # type: ignore[attr-defined]


def partial_gradients(model: LocalModel, run: RunConfig) -> set[str]:
    """Global names of the parameters of which each tensor-parallel rank sees only a part of the gradient.

    These are the replicated parameters that sequence parallelism shows a part of the positions, q/k-norms, which see
    this rank's heads only, and those matrices of adapters whose partner is split. The first are known by a mark on the
    parameter, which an engine that replaces parameters loses.
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return set()

    def is_partial(name: str, parameter: torch.nn.Parameter) -> bool:
        is_whole = isinstance(split_of(name, run), Replicated)
        sees_some_heads = is_whole and ("q_layernorm" in name or "k_layernorm" in name)
        sees_some_rows = is_whole and is_adapter(name)
        return sees_some_heads or sees_some_rows or getattr(parameter, "sequence_parallel", False)

    return {name for name, parameter in model.trainable() if is_partial(name, parameter)}


def add_gradient_sums(model: LocalModel, run: RunConfig) -> None:
    """Sum gradients of `partial_gradients` over tensor-parallel ranks.

    DeepSpeed does none of it; one hook per parameter suits every ZeRO stage (docs/pitfalls.md).
    """
    group = parallel_state.get_tensor_model_parallel_group()
    partial = partial_gradients(model, run)

    def sum_over_ranks(grad: torch.Tensor) -> torch.Tensor:
        summed = grad.float()
        if summed is grad:
            summed = grad.clone()  # autograd may share a gradient among several users
        dist.all_reduce(summed, group=group)
        return summed.to(grad.dtype)

    for name, parameter in model.trainable():
        if name in partial:
            parameter.register_hook(sum_over_ranks)
