"""What start-up, a save and a load cost each rank: seconds, memory and bytes that are sent.

    torchrun --nproc-per-node 4 -m skv_tools.bench.scale CONFIG.yaml --dir FOLDER [section.key=value ...]

Nothing is trained. Bytes are those of the tensors that a rank hands to collectives. Memory is what a rank's resident
set grew by, at its peak (Linux). Each figure is that of the rank that has most.
"""

import argparse
import gc
import inspect
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skv_dist.commands.entry_point import entry_point
from skv_dist.config.load import load_config
from skv_dist.config.run import derive
from skv_dist.errors import UserError

from .shapes import with_vocabulary

_HEADER = "| | seconds | more memory, at peak (GiB) | sent (GiB) |\n|---|---|---|---|"


def _measure(name: str, action: Callable[[], Any]) -> str:
    """A line of the table. Collective."""
    import torch
    import torch.distributed as dist

    from .checkpoint import _reset_peak, _resident
    from .traffic import watched_traffic

    gc.collect()
    dist.barrier()
    _reset_peak()
    before, began = _resident()[0], time.perf_counter()
    with watched_traffic() as traffic:
        action()
    seconds, peak = time.perf_counter() - began, _resident()[1]
    figures = torch.tensor([seconds, (peak - before) / 2**30, traffic.num_bytes / 2**30], dtype=torch.float64)
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    return f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures.tolist()) + " |"


@entry_point
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.scale", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dir", type=Path, required=True, help="folder to create and remove, on the disk to measure")
    arguments = parser.parse_intermixed_args(argv)
    if not sys.platform.startswith("linux"):
        raise UserError("memory is read from /proc: this benchmark runs on Linux only")
    if arguments.dir.exists() and int(os.environ.get("RANK", "0")) == 0:
        raise UserError(f"{arguments.dir} exists already: name a folder to create")
    run = with_vocabulary(load_config(arguments.config, arguments.overrides))

    import deepspeed  # noqa: F401  (its import is no part of what is measured)

    from skv_dist.checkpoint import folder as files
    from skv_dist.checkpoint.load import load_checkpoint
    from skv_dist.checkpoint.metadata import SafeReader
    from skv_dist.checkpoint.save import Saver
    from skv_dist.parallel.engines.create import create_engine
    from skv_dist.parallel.processes import groups, launcher

    from .machine import heading, layout

    derived = derive(run, launcher.world_size())
    world = groups.start(run.parallel)
    engine: Any = None

    def make(**how: bool) -> None:
        nonlocal engine
        engine = create_engine(run, world.device, **how)

    rows = [_measure("start of a new run", make)]
    if "initialize" in inspect.signature(create_engine).parameters:  # versions before drew on resume as well
        engine.close()
        engine = None
        rows.append(_measure("start to resume, but for reading", lambda: make(initialize=False)))
    arguments.dir.mkdir(exist_ok=True, parents=True)
    root = arguments.dir / files.CHECKPOINTS
    engine.prepare_moments()
    saver = Saver(engine, run, root)
    folder = files.folder_of(root, 1)
    rows.append(_measure("standing still for a save", lambda: saver.save(1, {"step": 1, "tokenizer": "", "guard": {}})))
    rows.append(_measure("writing in the background", saver.wait))
    if not folder.is_dir():
        raise UserError(f"{folder} was not written: see the line above")
    rows.append(_measure("loading", lambda: load_checkpoint(engine, run, folder, weights_only=False)))
    saver.close()
    engine.close()
    if world.is_first:
        stored = list(folder.glob("*.distcp"))
        num_bytes = sum(path.stat().st_size for path in stored)
        entries = SafeReader(folder).read_metadata().state_dict_metadata.values()
        num_blocks = sum(len(entry.chunks) for entry in entries)  # type: ignore[union-attr, misc]
        metadata_bytes = (folder / ".metadata").stat().st_size
        shutil.rmtree(arguments.dir)
        print(
            f"{heading(world.device)}; {num_bytes / 12e6:.1f} M parameters; {layout(run, derived)}, "
            f"{run.train.precision}; {len(stored)} files, {num_blocks} blocks, .metadata {metadata_bytes / 1000:.0f} kB"
            f"\n\n{_HEADER}"
        )
        print("\n".join(rows), flush=True)
    groups.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
