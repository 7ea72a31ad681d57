"""Layouts of up to four GPUs: losses against one CPU process, speed, and what happens when a process is lost.

    python -m skv_tools.bench.layouts parity FOLDER data.sources.0.path=runs/quickstart/stdlib
    python -m skv_tools.bench.layouts speed FOLDER
    python -m skv_tools.bench.layouts lost FOLDER data.sources.0.path=runs/quickstart/stdlib
    python -m skv_tools.bench.layouts table FOLDER

The first three fill FOLDER and pass over what is there, so that the same command goes on where it was stopped; the last
prints it as Markdown. ``parity`` and ``lost`` run ``skv-train`` on ``configs/tiny.yaml``, ``speed`` runs `bench.train`.
On a machine without GPUs they run over CPU processes, to try them: slowly, with ``--shape tiny``.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from skv_dist.checkpoint.folder import METRICS
from skv_dist.commands.entry_point import entry_point
from skv_dist.errors import UserError

TRAIN = "skv_dist.commands.train"
_COMPILED = ["train.compile=true"]
_BF16 = ["train.precision=bf16"]
_TP2_PP2 = ["parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.pipeline=2"]
_TP4 = ["parallel.tensor=4", "parallel.sequence_parallel=true"]
_PP2_V2 = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]
# One process on the CPU, with which all are compared: that of the same table as docs/results/bench_gpu.md.
_SAME = [
    "model.head_dim=32",
    "train.steps=50",
    "train.micro_batch_size=4",
    "optimizer.lr=1e-3",
    "optimizer.warmup_steps=20",
    "eval.every=0",
    "checkpoint.at_end=false",
    "train.tensorboard=false",
    "train.progress=false",
]
REFERENCE = "CPU, fp32"
# name: (processes, keys). A process on the CPU is one that has no GPU to see.
PARITY: dict[str, tuple[int, list[str]]] = {
    REFERENCE: (0, []),
    "CPU, bf16": (0, _BF16),
    "one GPU, fp32": (1, []),
    "tensor 2 with sequence parallelism, fp32": (2, ["parallel.tensor=2", "parallel.sequence_parallel=true"]),
    "pipeline 2, fp32": (2, ["parallel.pipeline=2"]),
    **{f"data 4, ZeRO {stage}, fp32": (4, [f"parallel.zero_stage={stage}"]) for stage in range(4)},
    "tensor 2 x pipeline 2, fp32": (4, _TP2_PP2),
    "tensor 2 x pipeline 2, fp32, compiled": (4, [*_TP2_PP2, *_COMPILED]),
    "pipeline 2 x data 2, ZeRO 1, fp32, compiled": (4, ["parallel.pipeline=2", *_COMPILED]),
    "tensor 4 with sequence parallelism, fp32, compiled": (4, [*_TP4, *_COMPILED]),
    "pipeline 4, fp32, compiled": (4, ["parallel.pipeline=4", *_COMPILED]),
    "tensor 2 x pipeline 2, bf16, compiled": (4, [*_TP2_PP2, *_BF16, *_COMPILED]),
    "pipeline 4, bf16, compiled": (4, ["parallel.pipeline=4", *_BF16, *_COMPILED]),
    "tensor 4 with sequence parallelism, bf16, compiled": (4, [*_TP4, *_BF16, *_COMPILED]),
    "pipeline 2 with 2 chunks each, bf16, compiled": (2, [*_PP2_V2, *_BF16, *_COMPILED]),
    "pipeline 2 with 2 chunks each x data 2, ZeRO 2, bf16, compiled": (
        4,
        [*_PP2_V2, "parallel.zero_stage=2", *_BF16, *_COMPILED],
    ),
}
# name: (processes, sequences a micro-batch, micro-batches a replica, keys of `parallel`). A step of four GPUs has 32
# sequences in all of them. Uneven stages make up for the head, which costs as much as six of the 28 layers.
SPEED: dict[str, tuple[int, int, list[int], list[str]]] = {
    "one GPU": (1, 8, [1, 4], ["zero_stage=0"]),
    "data 2, ZeRO 0": (2, 8, [1, 2], ["zero_stage=0"]),
    "data 4, ZeRO 0": (4, 8, [1], ["zero_stage=0"]),
    "pipeline 4": (4, 2, [8, 16], ["pipeline=4", "first_stage_layers=9", "last_stage_layers=3", "zero_stage=0"]),
    "tensor 2 x pipeline 2": (
        4,
        4,
        [4, 8],
        ["tensor=2", "sequence_parallel=true", "pipeline=2", "last_stage_layers=11", "zero_stage=0"],
    ),
    "tensor 2 x data 2, ZeRO 0": (4, 8, [2], ["tensor=2", "sequence_parallel=true", "zero_stage=0"]),
    "tensor 4": (4, 8, [4], ["tensor=4", "sequence_parallel=true", "zero_stage=0"]),
    "data 4, ZeRO 1": (4, 8, [1], ["zero_stage=1"]),
    "pipeline 2 x data 2, ZeRO 0": (4, 2, [4, 8], ["pipeline=2", "last_stage_layers=11", "zero_stage=0"]),
    "data 4, ZeRO 2": (4, 8, [1], ["zero_stage=2"]),
    "pipeline 2 with 2 chunks each x data 2, ZeRO 0": (
        4,
        2,
        [4, 8],
        ["pipeline=2", "virtual_pipeline=2", "zero_stage=0"],
    ),
}


@dataclass
class Job:
    """A command over some processes, and the folder that it fills."""

    name: str
    processes: int  # 0: one, on the CPU
    arguments: list[str]  # of python
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> Path:
        """Says how it ended: exit status and seconds."""
        return self.folder / "ended.json"


def _folder_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def _start(job: Job, devices: Sequence[str]) -> subprocess.Popen[bytes]:
    job.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **job.environment}
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    if not devices:
        environment |= {"DS_ACCELERATOR": "cpu"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.processes)]
    line = [sys.executable, *(launcher if job.processes > 1 else []), *job.arguments]
    with (job.folder / "output.txt").open("wb") as output:
        return subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=environment)


def execute(jobs: Sequence[Job], num_gpus: int, at_a_time: int, seconds: float, limit: float) -> None:
    """Run what has not been run, each job on the least used GPUs, at most so many processes at a time.

    Args:
        seconds: after so long, none is started any more.
        limit: a job that takes longer is ended, and counts as failed.
    """
    waiting = [job for job in jobs if not job.ended.exists()]
    running: list[tuple[Job, list[str], subprocess.Popen[bytes], float]] = []
    began = time.monotonic()
    try:
        while running or (waiting and time.monotonic() - began < seconds):
            used = sum(max(1, job.processes) for job, *_ in running)
            if waiting and time.monotonic() - began < seconds and used + max(1, waiting[0].processes) <= at_a_time:
                job = waiting.pop(0)
                load = {str(gpu): sum(str(gpu) in devices for _, devices, *_ in running) for gpu in range(num_gpus)}
                devices = sorted(sorted(load, key=lambda gpu: load[gpu])[: job.processes])
                running.append((job, devices, _start(job, devices), time.monotonic()))
                continue
            time.sleep(0.2)
            for _, _, process, at in running:
                if time.monotonic() - at > limit:
                    process.terminate()
            for entry in [entry for entry in running if entry[2].poll() is not None]:
                job, _, process, at = entry
                running.remove(entry)
                took = time.monotonic() - at
                job.ended.write_text(json.dumps({"status": process.returncode, "seconds": took}) + "\n")
                print(f"{time.monotonic() - began:6.0f} s  {job.name}: {process.returncode}, {took:.0f} s", flush=True)
    finally:
        for _, _, process, _ in running:
            process.terminate()


def _parity_jobs(folder: Path, overrides: Sequence[str]) -> list[Job]:
    jobs = []
    for name, (processes, keys) in PARITY.items():
        place = folder / "parity" / _folder_name(name)
        line = ["-m", TRAIN, "configs/tiny.yaml", *_SAME, *overrides, *keys, f"train.output_dir={place / 'run'}"]
        environment = {"OMP_NUM_THREADS": "4"} if processes == 0 else {}
        jobs.append(Job(name, processes, line, place, environment))
    return jobs


def _speed_jobs(folder: Path, options: Sequence[str]) -> list[Job]:
    jobs = []
    for name, (processes, micro_batch, accumulate, keys) in SPEED.items():
        place = folder / "speed" / _folder_name(name)
        line = [
            "-m",
            "skv_tools.bench.train",
            "--rounds=1",
            "--steps=8",
            "--warmup=3",
            "--compile-steps=3",
            f"--micro-batch={micro_batch}",
        ]
        line += [*options, "--accumulate", *map(str, accumulate), "--parallel", *keys]
        jobs.append(Job(name, processes, [*line, "--out", str(place / "report.json")], place))
    return jobs


def losses(run: Path) -> list[float]:
    """The loss of every step of a run."""
    return [json.loads(line)["loss"] for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]


def _largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))


def _last_line(folder: Path) -> str:
    lines = (folder / "output.txt").read_text(errors="replace").strip().splitlines()
    return next((line for line in lines if "rror" in line), (lines or ["no output"])[-1])[:200]


def parity_table(folder: Path) -> str:
    """Markdown: the largest relative difference of the loss to the reference, by layout."""
    jobs = {job.name: job for job in _parity_jobs(folder, []) if job.ended.exists()}
    if REFERENCE not in jobs:
        return ""
    expected = losses(jobs.pop(REFERENCE).folder / "run")
    text = "| layout | first 10 steps | 50 steps |\n|---|---|---|\n"
    for name, job in jobs.items():
        if json.loads(job.ended.read_text())["status"]:
            text += f"| {name} | failed: {_last_line(job.folder)} | |\n"
            continue
        found = losses(job.folder / "run")
        early, whole = _largest_difference(found[:10], expected[:10]), _largest_difference(found, expected)
        text += f"| {name} | {early:.1e} | {whole:.1e} |\n"
    return text


def _bubble(report: dict[str, Any], policy: str, name: str) -> str:
    """Fixed part of a step over its growing part, from two numbers of micro-batches, beside (p - 1) / (v m)."""
    given = dict(key.split("=") for key in SPEED[name][3])
    stages, chunks = int(given.get("pipeline", 1)), int(given.get("virtual_pipeline", 1))
    if stages == 1:
        return "–"
    few, many = (report[f"{policy} x {count}"] for count in SPEED[name][2])
    seconds = [entry["tokens_per_step"] / entry["tokens_per_second"] for entry in (few, many)]
    growth = (seconds[1] - seconds[0]) / (many["micro_batches"] - few["micro_batches"])
    growing = growth * many["micro_batches"]
    ideal = (stages - 1) / (chunks * many["micro_batches"])
    return f"{(seconds[1] - growing) / growing:.0%}, {ideal:.0%}"


def speed_table(folder: Path) -> str:
    """Markdown: speed, memory and bytes on the wire by layout and policy."""
    text = (
        "| layout | policy | tokens a step | micro-batches | tokens/s | MFU | peak GiB | wire, MiB a step | "
        "fixed part of a step, (p-1)/(v m) | compiled after warm-up |\n" + "|---" * 10 + "|\n"
    )
    for job in _speed_jobs(folder, []):
        if not job.ended.exists():
            continue
        if not (job.folder / "report.json").exists():
            text += f"| {job.name} | failed: {_last_line(job.folder)} |" + " |" * 8 + "\n"
            continue
        report = json.loads((job.folder / "report.json").read_text())
        for key, entry in report.items():
            if not isinstance(entry, dict):
                continue
            policy = key.partition(" ")[0]
            is_last = entry["micro_batches"] == SPEED[job.name][2][-1]
            mfu = f"{entry['mfu']:.3f}" if entry["mfu"] else "–"
            text += (
                f"| {job.name} | {policy} | {entry['tokens_per_step']:,} | {entry['micro_batches']} | "
                f"{entry['tokens_per_second']:,.0f} | {mfu} | {entry['peak_gib']:.1f} | "
                f"{entry['wire_mib_per_step']:,.0f} | {_bubble(report, policy, job.name) if is_last else '–'} | "
                f"{report['recompiled']} |\n"
            )
    return text


# How a process is lost: (signal, rank)
_LOST = {"killed": (signal.SIGKILL, 3), "stopped": (signal.SIGSTOP, 2)}


def _wait(until: Callable[[], bool], seconds: float) -> float:
    """Seconds until it is so; infinity where it is not in time."""
    began = time.monotonic()
    while not until():
        if time.monotonic() - began > seconds:
            return float("inf")
        time.sleep(0.05)
    return time.monotonic() - began


def _steps(run: Path) -> int:
    file = run / METRICS
    return len(file.read_text().splitlines()) if file.exists() else 0


def _lose_one(place: Path, how: signal.Signals, victim: int, overrides: Sequence[str], on_gpu: bool) -> dict[str, Any]:
    """Four processes without a launcher, of which one is lost after six steps: what the others say, and when."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place.mkdir(parents=True)
    line = [sys.executable, "-m", TRAIN, "configs/tiny.yaml", *_SAME, *overrides, "train.steps=100000"]
    line += ["parallel.pipeline=2", "parallel.timeout_minutes=1", f"train.output_dir={place / 'run'}"]
    processes = []
    for rank in range(4):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(port)} | ({} if on_gpu else {"DS_ACCELERATOR": "cpu"})
        with (place / f"rank{rank}.txt").open("wb") as output:
            own = {**os.environ, **environment}
            processes.append(subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=own))
    try:
        _wait(lambda: _steps(place / "run") >= 6, 200)
        processes[victim].send_signal(how)
        others = [process for rank, process in enumerate(processes) if rank != victim]
        took = [round(_wait(lambda: process.poll() is not None, 120), 1) for process in others]  # noqa: B023
        says = [_last_line_with_error(place / f"rank{rank}.txt") for rank in range(4) if rank != victim]
        return {"seconds": _since_the_loss(took), "status": [p.returncode for p in others], "says": says}
    finally:
        for process in processes:
            process.kill()


def _since_the_loss(waits: Sequence[float]) -> list[float]:
    """Seconds from the loss to the end of each process, from those that each was waited for after the one before."""
    return [round(sum(waits[: index + 1]), 1) for index in range(len(waits))]


def _last_line_with_error(file: Path) -> str:
    lines = [line for line in file.read_text(errors="replace").splitlines() if "error: " in line]
    return lines[-1] if lines else "no line of its own"


def _restart(place: Path, overrides: Sequence[str], num_processes: int) -> dict[str, Any]:
    """A worker of torchrun is killed behind a save; with --max-restarts the run goes on and ends."""
    place.mkdir(parents=True)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1", "--nproc-per-node"]
    line += [str(num_processes), "-m", TRAIN, "configs/tiny.yaml", *_SAME, *overrides]
    line += ["parallel.pipeline=2", "parallel.timeout_minutes=1", "checkpoint.every=10", "train.steps=400"]
    line.append(f"train.output_dir={place / 'run'}")
    with (place / "output.txt").open("wb") as output:
        launcher = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=os.environ)
    try:
        _wait(lambda: _steps(place / "run") >= 27, 200)
        children = subprocess.run(["pgrep", "-P", str(launcher.pid), "-f", TRAIN], capture_output=True, text=True)
        victim, at = int(children.stdout.split()[-1]), _steps(place / "run")
        os.kill(victim, signal.SIGKILL)
        went_on = _wait(lambda: "resumed from" in (place / "output.txt").read_text(errors="replace"), 200)
        _wait(lambda: launcher.poll() is not None, 200)
        text = (place / "output.txt").read_text(errors="replace")
        resumed = next((line for line in text.splitlines() if line.startswith("resumed from")), "not resumed")
        return {
            "killed_at_step": at,
            "seconds_until_it_went_on": round(went_on, 1),
            "says": resumed.split("/")[-1],
            "status": launcher.returncode,
            "steps_at_end": _steps(place / "run"),
        }
    finally:
        launcher.kill()


def lose(folder: Path, overrides: Sequence[str]) -> None:
    on_gpu = torch.cuda.is_available()
    for name, (how, victim) in _LOST.items():
        place = folder / "lost" / name
        if not (place / "seen.json").exists():
            shutil.rmtree(place, ignore_errors=True)
            seen = {"rank": victim, **_lose_one(place, how, victim, overrides, on_gpu)}
            (place / "seen.json").write_text(json.dumps(seen, indent=1) + "\n")
            print(name, json.dumps(seen), flush=True)
    place = folder / "lost" / "restarted"
    if not (place / "seen.json").exists():
        shutil.rmtree(place, ignore_errors=True)
        seen = _restart(place, overrides, 4)
        (place / "seen.json").write_text(json.dumps(seen, indent=1) + "\n")
        print("restarted", json.dumps(seen), flush=True)


@entry_point
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.layouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["parity", "speed", "lost", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all runs of skv-train")
    parser.add_argument("--shape", default="qwen3-1.7b", help="speed: a shape of bench.train (default: qwen3-1.7b)")
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="N", help="speed (default: 2048)")
    parser.add_argument("--at-a-time", type=int, default=24, metavar="N", help="parity: processes (default: 24)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no more runs after so long")
    parser.add_argument("--limit", type=float, default=float("inf"), help="end a run that takes more seconds")
    parser.add_argument("--before", metavar="COMMAND", help="speed: as of bench.train, to make the machine quiet")
    parser.add_argument("--after", metavar="COMMAND", help="speed: as of bench.train")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the parity or speed runs, by name")
    arguments = parser.parse_intermixed_args(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # `execute` then ends what it started
    num_gpus = torch.cuda.device_count()
    if arguments.what == "table":
        print(parity_table(arguments.folder), speed_table(arguments.folder), sep="\n")
        return 0
    if arguments.what == "lost":
        lose(arguments.folder, arguments.overrides)
        return 0
    if arguments.what == "parity":
        jobs, at_a_time = _parity_jobs(arguments.folder, arguments.overrides), arguments.at_a_time
    else:
        options = [f"--shape={arguments.shape}", f"--sequence-length={arguments.sequence_length}"]
        options += [f"--before={arguments.before}"] if arguments.before else []
        options += [f"--after={arguments.after}"] if arguments.after else []
        jobs, at_a_time = _speed_jobs(arguments.folder, options), 4
    if arguments.only:
        unknown = set(arguments.only) - {job.name for job in jobs}
        if unknown:
            raise UserError(f"--only {', '.join(sorted(unknown))}: choose from {'; '.join(job.name for job in jobs)}")
        jobs = [job for job in jobs if job.name in arguments.only]
    execute(jobs, num_gpus, at_a_time, arguments.seconds, arguments.limit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
