"""Between an engine's parameters and optimizer state, and the full tensors of a checkpoint.

Every value is stored under its global name with the shape it has in a single process, whatever the layout: the fp32
weight as ``model.NAME``, Adam's moments as ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` (`Quantity`). Within a
data-parallel group each parameter has one keeper that writes and reads it, so a rank holds its own share and one
parameter more, never the model.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from skv_dist.config.run import RunConfig
from skv_dist.parallel.engines.base import Engine, Quantity
from skv_dist.parallel.local_model import partitioned_shape
from skv_dist.parallel.tensor_split import Block, Replicated, split_of


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
    def __new__(cls, shape: Sequence[int], part: torch.Tensor, blocks: Sequence[Block]) -> "Shards":
        made = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape))
        made.part = part
        made._blocks = {torch.Size(block.offsets): part[block.slices] for block in blocks}
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


class Stored(NamedTuple):
    """A parameter of this stage, and the data-parallel rank that stores it."""

    name: str
    parameter: torch.nn.Parameter
    keeper: int


def stored_parameters(engine: Engine) -> Iterator[Stored]:
    """The parameters of this rank in order, each with the keeper that has the least to store so far."""
    loads = [0] * parallel_state.get_data_parallel_world_size()
    for name, parameter in engine.model.named():
        keeper = loads.index(min(loads))
        loads[keeper] += torch.Size(partitioned_shape(parameter)).numel()
        yield Stored(name, parameter, keeper)


def quantities_of(parameter: torch.nn.Parameter, wanted: Sequence[Quantity] = tuple(Quantity)) -> Sequence[Quantity]:
    """Those that the parameter has: a frozen one has no moments."""
    return [quantity for quantity in wanted if parameter.requires_grad or quantity is Quantity.WEIGHT]


def stored_name(quantity: Quantity, name: str) -> str:
    """Name on disk of one value of a parameter."""
    return f"{quantity.value}.{name}"


def _shards_of(stored: Stored, run: RunConfig, values: torch.Tensor, *, writes: bool) -> Shards:
    """Where ``values``, this tensor-parallel rank's part of a parameter, lie in the full tensor."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    part, split = partitioned_shape(stored.parameter), split_of(stored.name, run)
    blocks = split.blocks(rank, part)
    if writes and isinstance(split, Replicated) and rank > 0:
        blocks = []  # the first rank writes it
    return Shards(split.full_shape(part), values, blocks)


def snapshot(engine: Engine, run: RunConfig) -> dict[str, Shards]:
    """A copy on the CPU of what this rank stores. Collective over data-parallel ranks."""
    data_rank = parallel_state.get_data_parallel_rank()
    shards = {}
    for stored in stored_parameters(engine):
        for quantity in quantities_of(stored.parameter):
            value = engine.read(stored.parameter, quantity)
            if stored.keeper == data_rank:
                # to() alone would hand out the engine's own memory on a CPU
                copy = value.detach().to("cpu", torch.float32, copy=True).contiguous()
                shards[stored_name(quantity, stored.name)] = _shards_of(stored, run, copy, writes=True)
    return {name: pieces for name, pieces in shards.items() if pieces.__create_chunk_list__()}


def empty_shards(engine: Engine, run: RunConfig, quantities: Sequence[Quantity]) -> dict[str, Shards]:
    """Zeros for what this rank reads, in the same shares."""
    data_rank = parallel_state.get_data_parallel_rank()
    shards = {}
    for stored in stored_parameters(engine):
        for quantity in quantities_of(stored.parameter, quantities):
            if stored.keeper == data_rank:
                zeros = torch.zeros(partitioned_shape(stored.parameter))
                shards[stored_name(quantity, stored.name)] = _shards_of(stored, run, zeros, writes=False)
    return shards


@torch.no_grad()
def restore(engine: Engine, shards: dict[str, Shards], quantities: Sequence[Quantity]) -> None:
    """Hand each value from its keeper to its data-parallel group and set it. Collective over all ranks."""
    group = parallel_state.get_data_parallel_group()
    data_rank = parallel_state.get_data_parallel_rank()
    device = engine.model.device
    for stored in stored_parameters(engine):
        for quantity in quantities_of(stored.parameter, quantities):
            if stored.keeper == data_rank:
                value = shards[stored_name(quantity, stored.name)].part.to(device)
            else:
                value = torch.empty(partitioned_shape(stored.parameter), device=device)
            if group.size() > 1:
                dist.broadcast(value, dist.get_global_rank(group, stored.keeper), group=group)
            engine.write(stored.parameter, quantity, value)
    engine.tied.refresh()
