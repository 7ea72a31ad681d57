"""Time, rate and memory of saving and loading a checkpoint, beside plain writing and reading of the same bytes.

    torchrun --nproc-per-node 2 -m skv_tools.bench.checkpoint CONFIG.yaml --dir FOLDER [section.key=value ...]

Weights and Adam's moments are random; nothing is trained. Files are read from disk, not from the page cache, where the
system allows to drop them. Memory is the resident set of the rank that has most (Linux).
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skv_dist.config.load import load_config
from skv_dist.config.run import derive
from skv_dist.errors import UserError, command


def _resident() -> tuple[int, int]:
    """Bytes resident now, and at most since `_reset_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    now, most = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _drop_from_cache(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _write_plainly(file: Path, count: int, chunk: bytes) -> None:
    with file.open("wb") as stream:
        for begin in range(0, count, len(chunk)):
            stream.write(chunk[: count - begin])
        stream.flush()
        os.fsync(stream.fileno())


def _read_plainly(file: Path, size: int) -> None:
    buffer = bytearray(size)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bench_checkpoint", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dir", type=Path, required=True, help="folder to create and remove, on the disk to measure")
    arguments = parser.parse_intermixed_args(argv)
    if not sys.platform.startswith("linux"):
        raise UserError("memory is read from /proc: this benchmark runs on Linux only")
    if arguments.dir.exists() and int(os.environ.get("RANK", "0")) == 0:
        raise UserError(f"{arguments.dir} exists already: name a folder to create")
    run = load_config(arguments.config, arguments.overrides)

    import torch
    import torch.distributed as dist

    from skv_dist.checkpoint import folder as files
    from skv_dist.checkpoint.save import Saver, load, verify_everywhere
    from skv_dist.data.tokenizer import load_tokenizer
    from skv_dist.parallel.engines.base import MOMENTS
    from skv_dist.parallel.engines.create import create_engine
    from skv_dist.parallel.processes import groups

    derived = derive(run, groups.world_size_from_environment())
    vocab_size = run.model.vocab_size or load_tokenizer(run.data.tokenizer).vocab_size
    world = groups.start(run.parallel)
    engine = create_engine(run, vocab_size, world.device)
    engine.prepare_moments()
    for master in engine._masters():
        for what in MOMENTS:
            engine.optimizer.state[master][what].normal_()
    arguments.dir.mkdir(exist_ok=True, parents=True)
    root = arguments.dir / "checkpoints"
    saver = Saver(engine, run, vocab_size, root)
    folder = files.folder_of(root, 1)
    rows: list[tuple[str, float, int, int]] = []  # what, seconds, bytes resident before, most of them meanwhile

    def measure(name: str, action: Callable[[], Any]) -> None:
        dist.barrier()
        _reset_peak()
        before, began = _resident()[0], time.perf_counter()
        action()
        dist.barrier()
        figures = torch.tensor([time.perf_counter() - began, before, _resident()[1]], dtype=torch.float64)
        gathered = [torch.zeros_like(figures) for _ in range(world.size)]
        dist.all_gather(gathered, figures)
        seconds, resident, most = (max(float(one[i]) for one in gathered) for i in range(3))
        rows.append((name, seconds, int(resident), int(most)))

    measure("standing still for a save", lambda: saver.save(1, {"step": 1, "tokenizer": "", "guard": {}}))
    measure("writing in the background", saver.wait)
    if not folder.is_dir():
        raise UserError(f"{folder} was not written: see the line above")
    size = sum(path.stat().st_size for path in folder.iterdir())
    mine = arguments.dir / f"plain_{world.rank}"
    chunk = os.urandom(64 * 2**20)
    measure("plain writing", lambda: _write_plainly(mine, size // world.size, chunk))
    if world.is_first:
        _drop_from_cache(arguments.dir / "checkpoints" / folder.name)
        for path in arguments.dir.glob("plain_*"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    measure("plain reading", lambda: _read_plainly(mine, len(chunk)))
    measure("checking size and SHA-256", lambda: verify_everywhere(folder))
    if world.is_first:
        _drop_from_cache(folder)
    measure("loading", lambda: load(engine, run, vocab_size, folder, weights_only=False))
    saver.close()
    engine.close()
    if world.is_first:
        shutil.rmtree(arguments.dir)
        versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "megatron-core", "deepspeed"))
        parallel = run.parallel
        print(
            f"{datetime.date.today()}, CPU {platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}, {versions}; {size / 12e9:.3f} B parameters, {size / 2**30:.2f} GiB on disk; "
            f"{world.size} processes: tensor {parallel.tensor}, pipeline {parallel.pipeline}, data "
            f"{derived.data_parallel}, ZeRO {parallel.zero_stage}, {run.train.precision}\n\n"
            f"`bench_checkpoint {' '.join(sys.argv[1:])}`\n\n"
            "| what | seconds | GB/s | resident before (GiB) | peak (GiB) | more (GiB) |\n|---|---|---|---|---|---|"
        )
        for name, seconds, resident, most in rows:
            before, peak, more = (value / 2**30 for value in (resident, most, most - resident))
            rate = size / seconds / 1e9
            print(f"| {name} | {seconds:.2f} | {rate:.2f} | {before:.2f} | {peak:.2f} | {more:.2f} |")
    groups.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
