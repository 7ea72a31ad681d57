"""Speed of our own trainer, dense and routed by turns in one process, and where a step's time goes.

    python -m skv_tools.bench.train --shape qwen3-1.7b --sequence-length 2048 --micro-batch 8 --out FILE.json
    torchrun --nproc-per-node 2 -m skv_tools.bench.train --zero-stage 1 --out FILE.json    # two replicas
    torchrun --nproc-per-node 4 -m skv_tools.bench.train --parallel pipeline=4 last_stage_layers=4 --accumulate 8 16 ...

Random tokens; all else is what ``skv-train`` runs, over as many replicas as the processes give: data thread, guard,
clipping, AdamW with fp32 masters. Writes the median tokens/s of each routing policy (with several ``--accumulate``, of
each with each, as "r_cla x 8"), the peak memory of the fullest rank, the losses, bytes on the wire of a pipeline, how
often the host waited for the GPU within a step, graphs compiled after the warm-up, and with ``--profile`` the GPU time
of one step by group of kernels. The last three are those of the first rank.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from pydantic import ValidationError

from skv_dist.commands.arguments import ArgumentParser
from skv_dist.commands.entry_point import entry_point
from skv_dist.config.parallel import ParallelConfig
from skv_dist.config.run import RunConfig, derive
from skv_dist.data.packing import Sample
from skv_dist.errors import UserError
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.engines.create import create_engine
from skv_dist.parallel.processes import groups, launcher
from skv_dist.parallel.processes.groups import World
from skv_dist.training.callbacks import Callback, Metrics
from skv_dist.training.throughput import flops_per_token, peak_flops
from skv_dist.training.trainer import Trainer
from skv_dist.versions import software

from .machine import device_name, layout
from .shapes import SHAPES, read_shape, run_config

# Groups of kernels by a part of their names; the first that fits. Inductor names its kernels after what it fused.
_KERNEL_GROUPS = {
    "attention": ("flash", "fmha", "cudnn", "sdpa"),
    "loss": ("exp",),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "optimizer": ("adam", "lerp", "lpnorm", "multi_tensor"),
    "norms, rotary, SwiGLU, residuals (compiled)": ("triton",),
    "copies, sums, zeros": ("",),
}


class _Random:
    """Samples of random tokens."""

    def __init__(self, vocab_size: int, length: int) -> None:
        self._vocab_size, self._length = vocab_size, length

    def __getitem__(self, position: int) -> Sample:
        tokens = np.random.default_rng(position).integers(0, self._vocab_size, self._length + 1)
        return Sample(tokens, np.zeros(self._length + 1, np.int64))


def _profiler() -> Any:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])


class _Watch(Callback):
    """Collects metrics; counts, from step ``warmup`` on, what must not happen; profiles the last step if asked to."""

    def __init__(self, warmup: int, profile: bool) -> None:
        self.metrics: list[Metrics] = []
        self._warmup, self._profile = warmup, profile
        self._steps = 0
        self._caught: Any = None
        self.waits = 0
        self.milliseconds: dict[str, float] = {}  # by group of kernels
        self.kernels: list[tuple[str, float, int]] = []  # name, milliseconds, number of calls
        self._profiler: Any = None

    def on_start(self, step: int, steps: int) -> None:
        self._steps = steps
        if self._profile:  # the first profiler of a process may miss what runs while it sets itself up
            with _profiler():
                torch.cuda.synchronize()
        self._caught = warnings.catch_warnings(record=True)
        self._seen = self._caught.__enter__()
        warnings.simplefilter("always")

    def on_step(self, step: int, metrics: Metrics) -> None:
        self.metrics.append(metrics)
        if step == self._warmup and torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
            self._seen.clear()
        if self._profile and step == self._steps - 1:
            self._profiler = _profiler()
            self._profiler.__enter__()

    def on_end(self) -> None:
        if self._profiler is not None:
            torch.cuda.synchronize()
            self._profiler.__exit__(None, None, None)
            self._read_profile()
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        self.waits = sum("synchronizing" in str(warning.message) for warning in self._seen)
        self._caught.__exit__(None, None, None)

    def _read_profile(self) -> None:
        kernels = [e for e in self._profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        sums: dict[str, float] = defaultdict(float)
        by_name: dict[str, list[float]] = defaultdict(list)
        for kernel in kernels:
            name = kernel.name.lower()
            group = next(group for group, parts in _KERNEL_GROUPS.items() if any(part in name for part in parts))
            sums[group] += kernel.time_range.elapsed_us() / 1e3
            by_name[kernel.name].append(kernel.time_range.elapsed_us() / 1e3)
        if not kernels:
            print("the profiler saw no kernel", flush=True)
            return
        spans = sorted((k.time_range.start, k.time_range.end) for k in kernels)
        busy, end = 0.0, float("-inf")
        for begin, stop in spans:
            busy += max(0.0, stop - max(begin, end))
            end = max(end, stop)
        self.milliseconds = {**sums, "idle": (spans[-1][1] - spans[0][0] - busy) / 1e3}
        self.kernels = sorted(((n, sum(t), len(t)) for n, t in by_name.items()), key=lambda entry: -entry[1])


def _parallel(arguments: argparse.Namespace) -> dict[str, Any]:
    """The ``parallel`` section that ``--parallel`` and ``--zero-stage`` ask for."""
    given: dict[str, Any] = {"zero_stage": arguments.zero_stage}
    for entry in arguments.parallel:
        key, equals, value = entry.partition("=")
        if not equals or key not in ParallelConfig.model_fields:
            raise UserError(f"--parallel {entry}: give KEY=VALUE, KEY one of {', '.join(ParallelConfig.model_fields)}")
        given[key] = yaml.safe_load(value)
    return given


def _configs(arguments: argparse.Namespace, processes: int) -> dict[str, RunConfig]:
    """What is to be measured, by the name that it has in the report."""
    parallel, shape = _parallel(arguments), read_shape(arguments.shape)
    replicas = max(1, processes // (parallel.get("tensor", 1) * parallel.get("pipeline", 1)))
    runs = {}
    for policy, accumulate in itertools.product(arguments.routing, arguments.accumulate):
        train = {
            "steps": arguments.steps,
            "compile": torch.cuda.is_available(),
            "global_batch_size": arguments.micro_batch * accumulate * replicas,
            "micro_batch_size": arguments.micro_batch,
            "recompute": arguments.recompute,
        }
        name = policy if len(arguments.accumulate) == 1 else f"{policy} x {accumulate}"
        try:
            runs[name] = run_config(shape, arguments.sequence_length, train, policy=policy, parallel=parallel)
        except ValidationError as error:
            raise UserError(f"--parallel {' '.join(arguments.parallel)}: {error.errors()[0]['msg']}") from error
        derive(runs[name], processes)  # refused here, before the processes meet
    return runs


def _measure(engine: Engine, run: RunConfig, world: World, warmup: int, profile: bool) -> _Watch:
    derived = derive(run, world.size)
    watch = _Watch(warmup, profile)
    samples = _Random(run.vocab_size, run.data.sequence_length)
    Trainer(run, derived, world, engine, samples).fit([watch])
    return watch


def _run_command(command: str | None, world: World) -> None:
    """On the first rank, while the others wait."""
    if command is not None:
        if world.is_first:
            subprocess.run(command, shell=True, check=True)
        dist.barrier()


def _largest(value: float, world: World) -> float:
    """Of all ranks. Collective."""
    largest = torch.tensor(value, dtype=torch.float64, device=world.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


@entry_point
def main(argv: list[str]) -> int:
    parser = ArgumentParser(
        prog="bench.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument(
        "--accumulate", type=int, nargs="+", default=[1], metavar="K", help="micro-batches of a replica (default: 1)"
    )
    parser.add_argument("--routing", nargs="+", default=["none", "r_cla"], help="policies (default: none r_cla)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each policy (default: 2)")
    parser.add_argument("--steps", type=int, default=20, help="steps a turn (default: 20)")
    parser.add_argument("--warmup", type=int, default=5, help="of which so many are not counted (default: 5)")
    parser.add_argument("--compile-steps", type=int, help="steps of the turn that compiles (default: as the others)")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument(
        "--parallel", nargs="+", default=[], metavar="KEY=VALUE", help="other keys of the parallel section"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--before", metavar="COMMAND", help="run in front of the first turn that counts, such as to make the host quiet"
    )
    parser.add_argument("--after", metavar="COMMAND", help="run behind the last turn")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args(argv)
    if arguments.warmup >= arguments.steps:
        raise UserError("--warmup must be smaller than --steps")
    from torch._dynamo.utils import counters

    processes = launcher.world_size()
    runs = _configs(arguments, processes)
    first = next(iter(runs.values()))
    world = groups.start(first.parallel)
    engine = create_engine(first, world.device)
    watches_of: dict[str, list[_Watch]] = {name: [] for name in runs}
    compiled = 0
    for turn in range(arguments.rounds + 1):  # the first compiles
        if turn == 1:
            compiled = counters["stats"]["unique_graphs"]
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            _run_command(arguments.before, world)
        for name, run in runs.items():
            if turn == 0 and arguments.compile_steps is not None:
                run = run.model_copy(update={"train": run.train.model_copy(update={"steps": arguments.compile_steps})})
            last = turn == arguments.rounds and arguments.profile and world.device.type == "cuda"
            watches_of[name].append(_measure(engine, run, world, arguments.warmup, last))
    _run_command(arguments.after, world)
    flops = flops_per_token(first)
    peak = peak_flops(world.device)
    report: dict[str, Any] = {
        "trainer": "skv-dist",
        "device": device_name(world.device),
        "layout": layout(first, derive(first, processes)),
        "processes": processes,
        "software": software(),
        "command": " ".join(argv),
        "flops_per_token": flops,
        "recompiled": counters["stats"]["unique_graphs"] - compiled,
    }
    for name, watches in watches_of.items():
        measured = [m for w in watches[1:] for m in w.metrics[arguments.warmup : -1]]
        rate = statistics.median(float(m["tokens_per_second"]) for m in measured)
        steps = sum(len(w.metrics) - arguments.warmup for w in watches[1:])
        report[name] = {
            "tokens_per_second": rate,
            "tokens_per_step": derive(runs[name], processes).tokens_per_step,
            "micro_batches": derive(runs[name], processes).num_micro_batches,
            "model_tflops_per_second": rate * flops / 1e12,
            "mfu": rate * flops / (peak * processes) if peak else None,
            "peak_gib": _largest(float(watches[-1].metrics[-1]["peak_memory_bytes"]), world) / 2**30,
            "wire_mib_per_step": statistics.mean(float(m.get("wire_bytes", 0)) for m in measured) / 2**20,
            "waits_per_step": sum(w.waits for w in watches[1:]) / steps,
            "losses": [m["loss"] for m in watches[0].metrics],
            "milliseconds": watches[-1].milliseconds,
            "kernels": watches[-1].kernels[:80],
        }
        if world.is_first:
            print(f"{name}: {rate:,.0f} tokens/s, {report[name]['waits_per_step']:.2f} waits a step", flush=True)
    if world.is_first:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    engine.close()
    groups.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
