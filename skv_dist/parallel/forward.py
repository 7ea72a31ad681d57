"""Logits of a batch under one sharing map, in any layout."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.model.kv_cache import KvCache
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.wire.packing import Packing
from skv_dist.routing import RoutePlan


class Forward:
    """Runs batches through all chunks of this replica, one after the other.

    Args:
        plan: the sharing map.
    """

    def __init__(self, engine: Engine, run: RunConfig, plan: RoutePlan) -> None:
        self._engine, self._plan, self._compiled = engine, plan, run.train.compile
        self._chunks = engine.model.routed_chunks()
        packing = Packing.of(run)
        self._widths = [packing.width(len(live)) for live in plan.live_at_boundaries(run.stages)]
        self._splitting = _splits_positions(engine.model)

    def new_caches(self, capacity: int, begins: torch.Tensor) -> list[KvCache]:
        """An empty `KvCache` for each chunk of this rank."""
        return [KvCache(capacity, begins) for _ in self._chunks]

    @torch.no_grad()
    def logits(
        self, tokens: torch.Tensor, caches: Sequence[KvCache] | None = None, gather: bool = True
    ) -> torch.Tensor | None:
        """Collective over this replica's ranks, which all pass the same ``tokens`` [b, s]. Where
        `Engine.forward_is_collective`, all replicas call this equally often.

        Args:
            caches: of `new_caches`; see `RoutedChunk.forward`, which also says the shape of the logits.
            gather: see there.

        Returns:
            None on other stages than the last.
        """
        self._engine.eval()
        # What is compiled is so for one length of sequence; here each batch has another.
        stance = torch.compiler.set_stance("force_eager") if self._compiled else contextlib.nullcontext()
        with stance, self._whole_sequences():
            return self._run_chunks(tokens, caches or [None] * len(self._chunks), gather)

    def _run_chunks(self, tokens: torch.Tensor, caches: Sequence[KvCache | None], gather: bool) -> torch.Tensor | None:
        group = parallel_state.get_pipeline_model_parallel_group()
        stage, num_stages = group.rank(), group.size()
        before, behind = (dist.get_global_rank(group, (stage + step) % num_stages) for step in (-1, 1))
        for index, (chunk, cache) in enumerate(zip(self._chunks, caches, strict=True)):
            place = index * num_stages + stage  # in the order of execution
            received = None
            if not chunk.has_embedding:
                shape = (tokens.shape[1], tokens.shape[0], self._widths[place - 1])
                received = torch.empty(shape, dtype=chunk.config.params_dtype, device=tokens.device)
                dist.recv(received, before, group=group)
            out = self._engine.forward(index, self._plan, tokens, received=received, cache=cache, gather=gather)
            if chunk.has_head:
                return out
            dist.send(out.contiguous(), behind, group=group)
        return None

    @contextlib.contextmanager
    def _whole_sequences(self) -> Iterator[None]:
        """Sequence parallelism switched off: the one position of a new token cannot be shared out over ranks."""
        for owner, name in self._splitting:
            setattr(owner, name, False)
        try:
            yield
        finally:
            for owner, name in self._splitting:
                setattr(owner, name, True)


def _splits_positions(model: torch.nn.Module) -> list[tuple[Any, str]]:
    """The switches of sequence parallelism that are on: an object and the name of its attribute."""
    owners = [*model.modules(), *{id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()]
    names = ("sequence_parallel", "reduce_scatter_embeddings")
    return [(owner, name) for owner in owners for name in names if getattr(owner, name, None) is True]
