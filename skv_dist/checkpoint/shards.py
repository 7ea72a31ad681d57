"""Between an engine's parameters and optimizer state, and the full tensors of a checkpoint.

Every value is stored under its global name with the shape it has in a single process, whatever the layout: the fp32
weight as ``model.NAME``, Adam's moments as ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` (`State`). Within a data-parallel
group each parameter has one owner that writes and reads it, so a rank holds its own share and one parameter more, never
the model.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from skv_dist.config.run import RunConfig
from skv_dist.parallel.engines.base import Engine, State
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


class Owned(NamedTuple):
    """A parameter of this stage, and the data-parallel rank that stores it."""

    name: str
    parameter: torch.nn.Parameter
    owner: int


def owned_parameters(engine: Engine) -> Iterator[Owned]:
    """The parameters of this rank in order, each with the owner that has the least to store so far."""
    loads = [0] * parallel_state.get_data_parallel_world_size()
    for name, parameter in engine.model.named():
        owner = loads.index(min(loads))
        loads[owner] += torch.Size(partitioned_shape(parameter)).numel()
        yield Owned(name, parameter, owner)


def stored_name(state: State, name: str) -> str:
    """Name on disk of one value of a parameter."""
    return f"{state.value}.{name}"


def _shards_of(owned: Owned, run: RunConfig, values: torch.Tensor, *, writes: bool) -> Shards:
    """Where ``values``, this tensor-parallel rank's part of a parameter, lie in the full tensor."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    part, split = partitioned_shape(owned.parameter), split_of(owned.name, run)
    blocks = split.blocks(rank, part)
    if writes and isinstance(split, Replicated) and rank > 0:
        blocks = []  # the first rank writes it
    return Shards(split.full_shape(part), values, blocks)


def snapshot(engine: Engine, run: RunConfig) -> dict[str, Shards]:
    """A copy on the CPU of what this rank stores. Collective over data-parallel ranks."""
    data_rank = parallel_state.get_data_parallel_rank()
    shards = {}
    for owned in owned_parameters(engine):
        for state in State:
            value = engine.read(owned.parameter, state)
            if owned.owner == data_rank:
                # to() alone would hand out the engine's own memory on a CPU
                copy = value.detach().to("cpu", torch.float32, copy=True).contiguous()
                shards[stored_name(state, owned.name)] = _shards_of(owned, run, copy, writes=True)
    return {name: pieces for name, pieces in shards.items() if pieces.__create_chunk_list__()}


def empty_shards(engine: Engine, run: RunConfig, states: Sequence[State]) -> dict[str, Shards]:
    """Zeros for what this rank reads, in the same shares."""
    data_rank = parallel_state.get_data_parallel_rank()
    shards = {}
    for owned in owned_parameters(engine):
        for state in states:
            if owned.owner == data_rank:
                zeros = torch.zeros(partitioned_shape(owned.parameter))
                shards[stored_name(state, owned.name)] = _shards_of(owned, run, zeros, writes=False)
    return shards


@torch.no_grad()
def restore(engine: Engine, shards: dict[str, Shards], states: Sequence[State]) -> None:
    """Hand each value from its owner to its data-parallel group and set it. Collective over all ranks."""
    group = parallel_state.get_data_parallel_group()
    data_rank = parallel_state.get_data_parallel_rank()
    device = engine.model.device
    for owned in owned_parameters(engine):
        for state in states:
            if owned.owner == data_rank:
                value = shards[stored_name(state, owned.name)].part.to(device)
            else:
                value = torch.empty(partitioned_shape(owned.parameter), device=device)
            if group.size() > 1:
                dist.broadcast(value, dist.get_global_rank(group, owned.owner), group=group)
            engine.write(owned.parameter, state, value)
    engine.tied.refresh()
