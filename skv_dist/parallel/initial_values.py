"""The initial weights of a stage, drawn by all of its ranks together.

Values are those of the full parameters (`skv_dist.model.initialize`), whatever the layout. Each rank draws an equal
share of the parameters and hands it round block by block, so that nobody holds more than its own share in full.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.model.initialize import initial_constant, initial_rows, row_blocks
from skv_dist.parallel.local_model import LocalModel, partitioned_shape
from skv_dist.parallel.tensor_split import Block, split_of


def local_initial_values(
    run: RunConfig, model: LocalModel, chosen: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each parameter with its initial value on this rank, one at a time, float32 on the model's device.

    Collective over the tensor- and data-parallel ranks of the stage, which must all walk to the end.

    Args:
        chosen: tells by its global name whether a parameter is wanted.
    """
    group = parallel_state.get_tensor_and_data_parallel_group()
    shapes = {name: split_of(name, run).full_shape(partitioned_shape(p)) for name, p in model.named() if chosen(name)}
    drawers = _shared_out({n: s for n, s in shapes.items() if initial_constant(n, run.model) is None}, group.size())

    def rows(name: str) -> Iterator[torch.Tensor]:
        return initial_rows(name, shapes[name], run.model, run.train.seed)

    # All ranks draw at the same time, before the first waits for another.
    mine = {name: list(rows(name)) for name, rank in drawers.items() if group.size() > 1 and rank == group.rank()}
    for name, parameter in model.named():
        if name not in shapes:
            continue
        part = torch.zeros(partitioned_shape(parameter), device=model.device)
        constant = initial_constant(name, run.model)
        if constant is not None:
            yield parameter, part.fill_(constant)
            continue
        blocks = split_of(name, run).blocks(parallel_state.get_tensor_model_parallel_rank(), part.shape)
        drawn = iter(mine.pop(name)) if name in mine else rows(name)
        for numbers in row_blocks(shapes[name]):
            if drawers[name] == group.rank():
                values = next(drawn).to(model.device)
            else:
                values = torch.empty(len(numbers), *shapes[name][1:], device=model.device)
            if group.size() > 1:
                dist.broadcast(values, dist.get_global_rank(group, drawers[name]), group=group)
            _copy_rows(part, blocks, values, numbers)
        yield parameter, part


def _shared_out(shapes: dict[str, tuple[int, ...]], num_ranks: int) -> dict[str, int]:
    """The rank that draws each parameter: the one with the least to draw so far, the largest parameters first."""
    loads = [0] * num_ranks
    drawers = {}
    for name in sorted(shapes, key=lambda name: -torch.Size(shapes[name]).numel()):
        drawers[name] = loads.index(min(loads))
        loads[drawers[name]] += torch.Size(shapes[name]).numel()
    return drawers


def _copy_rows(part: torch.Tensor, blocks: Sequence[Block], values: torch.Tensor, numbers: range) -> None:
    """Copy into a rank's part what it holds of the full parameter's rows ``numbers``, which are ``values``."""
    for block in blocks:
        rows, *others = block.slices
        begin = max(block.offsets[0], numbers.start)
        end = min(block.offsets[0] + rows.stop - rows.start, numbers.stop)
        if begin < end:
            there = slice(rows.start + begin - block.offsets[0], rows.start + end - block.offsets[0])
            of_values = (slice(offset, offset + s.stop - s.start) for offset, s in zip(block.offsets[1:], others))
            part[(there, *others)] = values[(slice(begin - numbers.start, end - numbers.start), *of_values)]
