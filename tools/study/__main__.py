"""A grid of runs with several seeds each, on one machine, and a page about them.

    python -m skv_tools.study configs/study/draws.yaml             # runs what is missing, then writes the page
    python -m skv_tools.study configs/study/draws.yaml --report    # only writes the page, from the runs there are

Every run is a `skv-train` of its own; several share a GPU. A run that is finished is never run again, so the same
command goes on where it was stopped. The file names:

    title, prediction, reading                              text for the page
    page, output                                            the page, and the folder for the runs
    prepare: {folder: arguments of python -m that make it}  done first, where the folder is missing
    base: file.yaml                                         configuration that all runs have in common, beside this file
    seeds: [1, 2, 3]
    runs_per_gpu: 2
    variants: {name: {set: [section.key=value, ...], runs_per_gpu: 3, more_seeds: [4, 5], cached_layers: [[0, 1]]}}
    questions: [file.jsonl, --retention, 1, 0.5]            answered by every run
    compare: [[variant, variant], ...]                      differences to show, second minus first
    compare_shares: [[variant@0.50, variant@1.00], ...]     the same between two shares of the cache
    plots: folder                                           of figures, beside the page; none without it

``cached_layers`` are sets of layers that keep a cache, under which the runs of a variant are measured behind their last
step, beside the maps of ``eval.retention``. ``questions``, of the study and of a variant, are arguments of ``skv-eval
questions`` behind the checkpoint: its scores are measured likewise.

All variants run with ``seeds``, in the order given; then those with ``more_seeds`` run with these too. In ``set``,
``{seed}`` stands for the seed of the run. A run that reads from the folder of another (a teacher, initial weights)
waits until that one is finished, and those behind it go first.
"""

import argparse
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from skv_dist.commands.entry_point import entry_point
from skv_dist.errors import UserError

from .page import page
from .runs import Measurement, Run, load

TRAIN = "skv_dist.commands.train"  # the module behind skv-train
EVALUATE = "skv_dist.commands.evaluate"  # the module behind skv-eval


def start(run: Run, device: str) -> subprocess.Popen[bytes]:
    """The training of a run."""
    run.folder.mkdir(parents=True, exist_ok=True)
    for measurement in run.measurements:
        measurement.output.unlink(missing_ok=True)  # of one that failed: it is made again
    return _module(TRAIN, run.arguments, run.folder / "output.txt", device)


def evaluate(measurement: Measurement, device: str) -> subprocess.Popen[bytes]:
    """A measurement of a run that has ended."""
    return _module(EVALUATE, measurement.arguments, measurement.output, device)


def _module(module: str, arguments: Sequence[str], out: Path, device: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"} | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
    with out.open("wb") as output:
        line = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=environment)


def execute(runs: Sequence[Run], devices: Sequence[str], say: Callable[[str], None]) -> int:
    """Run them in order, on each device as many at a time as fit; the number that failed."""
    waiting, failed = list(runs), 0
    running: list[tuple[Run, str, subprocess.Popen[bytes], float]] = []
    try:
        while waiting or running:
            for device in devices:
                used = sum(run.share for run, place, *_ in running if place == device)
                run = next((run for run in waiting if all(other.record for other in run.needs)), None)
                if run is None and waiting and not running:
                    lost = {f"{one.variant}, seed {one.seed}" for run in waiting for one in run.needs if not one.record}
                    say(f"{len(waiting)} not started, which read from what is not finished: {'; '.join(sorted(lost))}")
                    return failed + len(waiting)
                if run is not None and used + run.share < 1.001:
                    waiting.remove(run)
                    say(f"{run.variant}, seed {run.seed}: started" + (f" on GPU {device}" if device else ""))
                    running.append((run, device, start(run, device), time.time()))
            time.sleep(1)
            for entry in [entry for entry in running if entry[2].poll() is not None]:
                run, device, process, began = entry
                running.remove(entry)
                seconds = time.time() - began
                missing = [measurement for measurement in run.measurements if not measurement.file.exists()]
                asked = [measurement.output for measurement in run.measurements if measurement.output.exists()]
                trained = asked or (process.returncode == 0 and run.complete)  # of what is asked, one has just ended
                if trained and missing and missing[0].output not in asked:
                    running.append((run, device, evaluate(missing[0], device), began))
                    continue
                if not trained or missing:
                    failed += 1
                    output = missing[0].output if trained else run.folder / "output.txt"
                    last = output.read_text(errors="replace").strip().splitlines()[-1:]
                    say(f"{run.variant}, seed {run.seed}: failed: {' '.join(last)}")
                    continue
                record = {"began": datetime.datetime.fromtimestamp(began).isoformat("T", "seconds"), "seconds": seconds}
                (run.folder / "run.json").write_text(json.dumps(record) + "\n")
                say(f"{run.variant}, seed {run.seed}: finished after {seconds:.0f} s, {len(waiting)} waiting")
    finally:
        for _, _, process, _ in running:
            process.terminate()
    return failed


@entry_point
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m skv_tools.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # `execute` then ends what it started
    study, runs = load(arguments.study)
    failed = 0
    if not arguments.report:
        for folder, line in study.get("prepare", {}).items():
            if not Path(folder).exists() and subprocess.run([sys.executable, "-m", *line], check=False).returncode:
                raise UserError(f"{folder} could not be made: python -m {shlex.join(line)}")
        import torch

        devices = [str(number) for number in range(torch.cuda.device_count())] or [""]
        began = time.time()
        missing = [run for run in runs if run.record is None]
        failed = execute(missing, devices, lambda line: print(f"{time.time() - began:6.0f} s  {line}", flush=True))
    out = Path(study["page"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(arguments.study, study, runs, TRAIN), encoding="utf-8")
    print(f"wrote {out}")
    if "plots" in study:
        from .plots import plot

        plot(runs, Path(study["plots"]))
        print(f"wrote the figures in {study['plots']}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
