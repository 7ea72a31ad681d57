"""Between an engine's parameters and optimizer state, and the full tensors of a checkpoint.

Every value is stored under its global name with the shape it has in a single process, whatever the layout: the fp32
weight as ``model.NAME``, Adam's moments as ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` (`Quantity`). Where ZeRO shares a
parameter's values out over the replicas, each writes what it holds. Where all hold them, each parameter has one keeper
among them that writes it, and each has one that reads it. So a rank holds a copy of its own share and one parameter
more, never of the model, and nothing is sent for a save.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from skv_dist.config.run import RunConfig
from skv_dist.parallel.engines.base import Engine, Piece, Quantity
from skv_dist.parallel.local_model import partitioned_shape
from skv_dist.parallel.tensor_split import Block, Replicated, split_of

_PROPERTIES = TensorProperties.create_from_tensor(torch.empty(0, dtype=torch.float32))


class Shards(torch.Tensor):
    """Blocks of one full tensor that this rank writes, or reads into.

    DCP asks for a tensor here, of the full shape and without data, that knows its blocks ("checkpointable").

    Args:
        shape: of the full tensor.
        blocks: by their offsets in it, fp32 on the CPU.
    """

    _blocks: dict[torch.Size, torch.Tensor]

    @staticmethod
    def __new__(cls, shape: Sequence[int], blocks: Mapping[tuple[int, ...], torch.Tensor]) -> "Shards":
        made = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape))
        made._blocks = {torch.Size(offsets): block for offsets, block in blocks.items()}
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
                tensor_data=TensorWriteData(chunk, _PROPERTIES, self.size()),
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


def snapshot(engine: Engine, run: RunConfig) -> dict[str, Shards]:
    """A copy on the CPU of what this rank stores. Sends nothing."""
    data_rank = parallel_state.get_data_parallel_rank()
    shards = {}
    for stored in stored_parameters(engine):
        part, split = partitioned_shape(stored.parameter), split_of(stored.name, run)
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        if isinstance(split, Replicated) and tensor_rank > 0:
            continue  # the first rank writes it
        blocks = split.blocks(tensor_rank, part)
        for quantity in quantities_of(stored.parameter):
            piece = engine.own_piece(stored.parameter, quantity)
            if piece is None and stored.keeper == data_rank:
                piece = Piece(0, engine.read(stored.parameter, quantity).flatten())
            if piece is not None and len(piece.values):
                # to() alone would hand out the engine's own memory on a CPU
                values = piece.values.detach().to("cpu", torch.float32, copy=True)
                within = blocks_of_piece(Piece(piece.begin, values), part, blocks)
                shards[stored_name(quantity, stored.name)] = Shards(split.full_shape(part), within)
    return {name: pieces for name, pieces in shards.items() if pieces.__create_chunk_list__()}


def blocks_of_piece(piece: Piece, part: Sequence[int], blocks: Sequence[Block]) -> dict[tuple[int, ...], torch.Tensor]:
    """A piece of a rank's part as blocks of the full tensor, by their offsets there.

    Consecutive elements of a matrix are at most three blocks: the rest of a row, whole rows, and the beginning of one.

    Args:
        part: shape of the part, one or two dimensions.
        blocks: of which the part consists.
    """
    width = part[1] if len(part) > 1 else 1
    begin, end = piece.begin, piece.begin + len(piece.values)
    first_whole, last_whole = -(-begin // width), end // width  # rows
    if first_whole > last_whole:  # within one row
        runs = [(begin, end)]
    else:
        runs = [(begin, first_whole * width), (first_whole * width, last_whole * width), (last_whole * width, end)]
    found = {}
    for run_begin, run_end in runs:
        if run_begin == run_end:
            continue
        row, column = divmod(run_begin, width)
        columns = min(width, run_end - run_begin)
        values = piece.values[run_begin - begin : run_end - begin].view(-1, columns)
        for block in blocks:
            rows_of, columns_of = (*block.slices, slice(0, 1))[:2]
            top, bottom = max(row, rows_of.start), min(row + len(values), rows_of.stop)
            left, right = max(column, columns_of.start), min(column + columns, columns_of.stop)
            if top < bottom and left < right:
                offsets = (top - rows_of.start + block.offsets[0], left - columns_of.start + (*block.offsets, 0)[1])
                inside = values[top - row : bottom - row, left - column : right - column]
                found[offsets[: len(part)]] = inside if len(part) > 1 else inside.flatten()
    return found


def empty_parts(
    engine: Engine, run: RunConfig, quantities: Sequence[Quantity], left_out: Callable[[str], bool]
) -> dict[str, torch.Tensor]:
    """Zeros of the shape of this rank's part, for each value that this rank reads.

    Args:
        left_out: tells by its global name whether a parameter is not read.
    """
    data_rank = parallel_state.get_data_parallel_rank()
    return {
        stored_name(quantity, stored.name): torch.zeros(partitioned_shape(stored.parameter))
        for stored in stored_parameters(engine)
        for quantity in quantities_of(stored.parameter, quantities)
        if stored.keeper == data_rank and not left_out(stored.name)
    }


def shards_to_read(engine: Engine, run: RunConfig, parts: Mapping[str, torch.Tensor]) -> dict[str, Shards]:
    """Where the values of ``parts`` (`empty_parts`), which are read into them, lie in full tensors."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    shards = {}
    for name, part in parts.items():
        split = split_of(name, run)
        blocks = {block.offsets: part[block.slices] for block in split.blocks(rank, part.shape)}
        shards[name] = Shards(split.full_shape(part.shape), blocks)
    return shards


@torch.no_grad()
def restore(
    engine: Engine,
    parts: Mapping[str, torch.Tensor],
    quantities: Sequence[Quantity],
    left_out: Callable[[str], bool],
) -> None:
    """Hand each value from its reader to its data-parallel group and set it. Collective over all ranks."""
    group = parallel_state.get_data_parallel_group()
    data_rank = parallel_state.get_data_parallel_rank()
    device = engine.model.device
    for stored in stored_parameters(engine):
        if left_out(stored.name):
            continue
        for quantity in quantities_of(stored.parameter, quantities):
            if stored.keeper == data_rank:
                value = parts[stored_name(quantity, stored.name)].to(device)
            else:
                value = torch.empty(partitioned_shape(stored.parameter), device=device)
            if group.size() > 1:
                dist.broadcast(value, dist.get_global_rank(group, stored.keeper), group=group)
            engine.write(stored.parameter, quantity, value)
    engine.tied.refresh()
