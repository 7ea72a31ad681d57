"""Time, rate and memory of saving and loading a checkpoint, beside plain writing and reading of the same bytes.

    torchrun --nproc-per-node 2 -m skv_tools.bench.checkpoint CONFIG.yaml --dir FOLDER [section.key=value ...]

Weights and Adam's moments are random; nothing is trained. Files are read from disk, not from the page cache, where the
system allows to drop them. Memory is the resident set of the rank that has most (Linux).
"""

import argparse
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skv_dist.commands.arguments import ArgumentParser
from skv_dist.commands.entry_point import entry_point
from skv_dist.config.load import load_config
from skv_dist.config.run import derive
from skv_dist.errors import UserError

from .shapes import with_vocabulary

_HEADER = "| | seconds | GB/s | resident before (GiB) | peak (GiB) | more (GiB) |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """Something that was done, by the rank that took most.

    Attributes:
        resident_bytes, peak_bytes: in memory before, and at most meanwhile.
    """

    name: str
    seconds: float
    resident_bytes: int
    peak_bytes: int

    def text(self, num_bytes: int) -> str:
        """A line of the table, for a checkpoint of ``num_bytes``."""
        gib = [n / 2**30 for n in (self.resident_bytes, self.peak_bytes, self.peak_bytes - self.resident_bytes)]
        memory = " | ".join(f"{size:.2f}" for size in gib)
        return f"| {self.name} | {self.seconds:.2f} | {num_bytes / self.seconds / 1e9:.2f} | {memory} |"


def _resident() -> tuple[int, int]:
    """Bytes resident now, and at most since `_reset_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _measure(name: str, action: Callable[[], Any]) -> Row:
    """Collective."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    _reset_peak()
    before, began = _resident()[0], time.perf_counter()
    action()
    dist.barrier()
    figures = torch.tensor([time.perf_counter() - began, before, _resident()[1]], dtype=torch.float64)
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    seconds, resident, peak = figures.tolist()
    return Row(name, seconds, int(resident), int(peak))


def _drop_from_cache(files: Iterable[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _write_plainly(file: Path, num_bytes: int, chunk: bytes) -> None:
    with file.open("wb") as stream:
        for begin in range(0, num_bytes, len(chunk)):
            stream.write(chunk[: num_bytes - begin])
        stream.flush()
        os.fsync(stream.fileno())


def _read_plainly(file: Path, chunk_bytes: int) -> None:
    buffer = bytearray(chunk_bytes)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


@entry_point
def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="bench.checkpoint", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dir", type=Path, required=True, help="folder to create and remove, on the disk to measure")
    arguments = parser.parse_intermixed_args(argv)
    if not sys.platform.startswith("linux"):
        raise UserError("memory is read from /proc: this benchmark runs on Linux only")
    if arguments.dir.exists() and int(os.environ.get("RANK", "0")) == 0:
        raise UserError(f"{arguments.dir} exists already: name a folder to create")
    run = with_vocabulary(load_config(arguments.config, arguments.overrides))

    import torch

    from skv_dist.checkpoint import folder as files
    from skv_dist.checkpoint.load import load_checkpoint, verify_everywhere
    from skv_dist.checkpoint.save import Saver
    from skv_dist.parallel.engines.base import MOMENTS
    from skv_dist.parallel.engines.create import create_engine
    from skv_dist.parallel.local_model import partitioned_shape
    from skv_dist.parallel.processes import groups, launcher

    from .machine import heading, layout

    derived = derive(run, launcher.world_size())
    world = groups.start(run.parallel)
    engine = create_engine(run, world.device)
    engine.prepare_moments()
    for _, parameter in engine.model.named():
        for moment in MOMENTS:
            engine.write(parameter, moment, torch.randn(partitioned_shape(parameter)))
    arguments.dir.mkdir(exist_ok=True, parents=True)
    root = arguments.dir / files.CHECKPOINTS
    saver = Saver(engine, run, root)
    folder = files.folder_of(root, 1)
    rows = [
        _measure("standing still for a save", lambda: saver.save(1, {"step": 1, "tokenizer": "", "guard": {}})),
        _measure("writing in the background", saver.wait),
    ]
    if not folder.is_dir():
        raise UserError(f"{folder} was not written: see the line above")
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    plain_file, chunk = arguments.dir / f"plain_{world.rank}", os.urandom(64 * 2**20)
    rows.append(_measure("plain writing", lambda: _write_plainly(plain_file, num_bytes // world.size, chunk)))
    if world.is_first:
        _drop_from_cache([*folder.iterdir(), *arguments.dir.glob("plain_*")])
    rows.append(_measure("plain reading", lambda: _read_plainly(plain_file, len(chunk))))
    rows.append(_measure("checking size and SHA-256", lambda: verify_everywhere(folder)))
    if world.is_first:
        _drop_from_cache(folder.iterdir())
    rows.append(_measure("loading", lambda: load_checkpoint(engine, run, folder, weights_only=False)))
    saver.close()
    engine.close()
    if world.is_first:
        shutil.rmtree(arguments.dir)
        print(
            f"{heading(world.device)}, {platform.machine()}, {os.cpu_count()} cores; {num_bytes / 12e9:.3f} B "
            f"parameters, {num_bytes / 2**30:.2f} GiB on disk; {layout(run, derived)}, {run.train.precision}\n\n"
            f"`python -m skv_tools.bench.checkpoint {' '.join(sys.argv[1:])}`\n\n{_HEADER}"
        )
        for row in rows:
            print(row.text(num_bytes))
    groups.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
