"""Between an engine's parameters and optimizer state, and the full tensors of a checkpoint.

Every value is stored under its global name with the shape it has in a single process, whatever the layout: the fp32
weight as ``model.NAME``, Adam's moments as ``exp_avg.NAME`` and ``exp_avg_sq.NAME``. Within a data-parallel group each
parameter has one owner that writes and reads it, so a rank holds its own share and one parameter more, never the model.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from skv_dist.config.run import RunConfig
from skv_dist.parallel.engines.base import MODEL, MOMENTS, Engine
from skv_dist.parallel.local_model import partitioned_shape
from skv_dist.parallel.tensor_split import Piece, full_shape, kind_of, pieces


class Shards(torch.Tensor):
    """Blocks of one full tensor that this rank writes, or reads into.

    DCP asks for a tensor here, of the full shape and without data, that knows its blocks ("checkpointable").

    Args:
        shape: of the full tensor.
        part: this rank's part, fp32 on the CPU.
        blocks: which blocks of it lie where.
    """

    part: torch.Tensor
    _blocks: dict[torch.Size, torch.Tensor]

    @staticmethod
    def __new__(cls, shape: Sequence[int], part: torch.Tensor, blocks: Sequence[Piece]) -> "Shards":
        made = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape))
        made.part = part
        made._blocks = {torch.Size(piece.offsets): part[piece.block] for piece in blocks}
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} of a tensor without data")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, block.size()) for offsets, block in self._blocks.items()]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(self.part), self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self._blocks[index.offset]


class Owned(NamedTuple):
    """A parameter of this stage, and the data-parallel rank that stores it."""

    name: str
    parameter: torch.nn.Parameter
    owner: int


def owned_parameters(engine: Engine) -> Iterator[Owned]:
    """The parameters of this rank in order, each with the owner that has the least to store so far."""
    loads = [0] * parallel_state.get_data_parallel_world_size()
    for name, parameter in engine.root.named():
        owner = loads.index(min(loads))
        loads[owner] += torch.Size(partitioned_shape(parameter)).numel()
        yield Owned(name, parameter, owner)


class _Layout:
    """How the parts of this tensor-parallel rank lie in full tensors."""

    def __init__(self, run: RunConfig, vocab_size: int) -> None:
        self._gated, self._vocab_size = run.model.gated, vocab_size
        self._rank = parallel_state.get_tensor_model_parallel_rank()
        self._size = parallel_state.get_tensor_model_parallel_world_size()

    def shards(self, owned: Owned, part: torch.Tensor, *, writes: bool) -> Shards:
        kind = kind_of(owned.name, self._gated)
        local = partitioned_shape(owned.parameter)
        blocks = pieces(kind, self._rank, self._size, local, self._vocab_size)
        if writes and kind == "replicated" and self._rank > 0:
            blocks = []  # the first rank writes it
        return Shards(full_shape(local, kind, self._size, self._vocab_size), part, blocks)


def snapshot(engine: Engine, run: RunConfig, vocab_size: int) -> dict[str, Shards]:
    """A copy on the CPU of what this rank stores. Collective over data-parallel ranks."""
    layout, mine = _Layout(run, vocab_size), parallel_state.get_data_parallel_rank()
    found = {}
    for owned in owned_parameters(engine):
        for what in (MODEL, *MOMENTS):
            value = engine.read(owned.parameter, what)
            if owned.owner == mine:
                # to() alone would hand out the engine's own memory on a CPU
                copy = value.detach().to("cpu", torch.float32, copy=True).contiguous()
                found[f"{what}.{owned.name}"] = layout.shards(owned, copy, writes=True)
    return {name: shards for name, shards in found.items() if shards.__create_chunk_list__()}


def empty_shards(engine: Engine, run: RunConfig, vocab_size: int, whats: Sequence[str]) -> dict[str, Shards]:
    """Zeros for what this rank reads, in the same shares."""
    layout, mine = _Layout(run, vocab_size), parallel_state.get_data_parallel_rank()
    return {
        f"{what}.{owned.name}": layout.shards(owned, torch.zeros(partitioned_shape(owned.parameter)), writes=False)
        for owned in owned_parameters(engine)
        for what in whats
        if owned.owner == mine
    }


@torch.no_grad()
def restore(engine: Engine, shards: dict[str, Shards], whats: Sequence[str]) -> None:
    """Hand each value from its owner to its data-parallel group and set it. Collective over all ranks."""
    group = parallel_state.get_data_parallel_group()
    mine = parallel_state.get_data_parallel_rank()
    for owned in owned_parameters(engine):
        for what in whats:
            if owned.owner == mine:
                value = shards[f"{what}.{owned.name}"].part.to(engine.root.device)
            else:
                value = torch.empty(partitioned_shape(owned.parameter), device=engine.root.device)
            if group.size() > 1:
                dist.broadcast(value, dist.get_global_rank(group, owned.owner), group=group)
            engine.write(owned.parameter, what, value)
    engine.tied.refresh()
