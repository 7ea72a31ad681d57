"""Reading checkpoints: into an engine of any layout, or tensor by tensor."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.metadata import SafeReader, read_into
from skv_dist.checkpoint.shards import empty_parts, restore, shards_to_read
from skv_dist.config.run import RunConfig
from skv_dist.data.lane_state import StreamOnDisk, parse_stream
from skv_dist.errors import UserError
from skv_dist.files import parse_json
from skv_dist.parallel.engines.base import Engine, Quantity
from skv_dist.parallel.processes.agree import first_error


def verify_everywhere(folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """`folder.verify` with the files shared out over the ranks. Collective.

    Raises:
        UserError: some rank cannot read a file; on all ranks alike.
        DamagedError: the folder is damaged; on all ranks alike.
    """
    damage = error = None
    try:
        files.verify(folder, dist.get_rank(group), dist.get_world_size(group))
    except files.DamagedError as problem:
        damage = str(problem)
    except UserError as problem:
        error = str(problem)
    if (agreed := first_error(error, group)) is not None:
        raise UserError(agreed)
    if (agreed := first_error(damage, group)) is not None:
        raise files.DamagedError(agreed)


def load_checkpoint(
    engine: Engine,
    run: RunConfig,
    folder: Path,
    *,
    weights_only: bool,
    left_out: Callable[[str], bool] = lambda name: False,
) -> None:
    """Set the engine's weights, and its optimizer state too unless ``weights_only``. Collective.

    The layout that wrote the folder does not matter.

    Args:
        left_out: tells by its global name whether a parameter is not read.

    Raises:
        UserError: a parameter is missing or has another shape, or a file is damaged.
    """
    quantities: Sequence[Quantity] = (Quantity.WEIGHT,) if weights_only else tuple(Quantity)
    if not weights_only:
        engine.prepare_moments()
    parts = empty_parts(engine, run, quantities, left_out)
    error = None
    try:
        read_into(folder, shards_to_read(engine, run, parts))
    except UserError as problem:
        error = str(problem)
    agreed = first_error(error)
    if agreed is not None:
        raise UserError(agreed)
    restore(engine, parts, quantities, left_out)
    if not weights_only:
        engine.num_updates = int(files.read_state(folder)["updates"])


def read_stream(folder: Path) -> StreamOnDisk | None:
    """Where the lanes of a stream are; None where the run did not stream.

    Raises:
        UserError: it cannot be read; DamagedError: it is not what was written.
    """
    file = folder / files.STREAM
    try:
        return parse_stream(parse_json(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise files.unreadable(file, error) from error
    except (ValueError, TypeError) as error:
        raise files.DamagedError(f"checkpoint {folder} is damaged: {files.STREAM} is not what was written") from error


def read_tensors(folder: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Full tensors by their names in the checkpoint, in one process without process groups.

    Raises:
        UserError: the folder is damaged.
    """
    shapes = tensor_shapes(folder)
    tensors = {name: torch.zeros(shapes[name]) for name in names}
    read_into(folder, tensors)
    return tensors


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint.

    Raises:
        UserError: ``.metadata`` is damaged or refused.
    """
    entries = SafeReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items()}  # type: ignore[union-attr]
