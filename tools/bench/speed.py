"""Our trainer and its peers on one GPU, one after the other in one call, as a Markdown table.

    python -m skv_tools.bench.speed --shape qwen3-1.7b --sequence-length 2048 --micro-batch 8 --out FILE.md

Ours is `skv_tools.bench.train` (dense and routed by turns), the peers are `skv_tools.bench.peers`, all with clipping at
1.0, random tokens of the full vocabulary and the same batch. ``--peers`` without a name leaves them out.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from skv_dist.commands.entry_point import entry_point

from .shapes import SHAPES, read_shape

# label: arguments of `peers`
PEERS = {
    "transformers": ["--peer", "transformers", "--compile", "layers"],
    "transformers, no fp32 masters": ["--peer", "transformers", "--compile", "layers", "--masters", "none"],
    "megatron-core": ["--peer", "megatron"],
    "megatron-core, no fp32 masters": ["--peer", "megatron", "--masters", "none"],
    "torchtitan": ["--peer", "torchtitan"],
}
HEADER = (
    "| trainer | tokens/s | TFLOP/s | MFU of data sheet | of measured ceiling | peak GiB | ours, routed, is |\n"
    "|---|---|---|---|---|---|---|\n"
)


def _run(module: str, arguments: list[str]) -> dict[str, Any]:
    """What a benchmark wrote, or ``{"not_run": why}``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        done = subprocess.run(
            [sys.executable, "-m", f"skv_tools.bench.{module}", *arguments, "--out", str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not out.exists():
            return {"not_run": (done.stderr.strip().splitlines() or ["no output"])[-1]}
        return dict(json.loads(out.read_text()))


def _row(label: str, measured: dict[str, Any], ceiling: float | None, ours: float) -> str:
    if "not_run" in measured:
        return f"| {label} | not run: {measured['not_run']} | | | | | |\n"
    rate, tflops = measured["tokens_per_second"], measured["model_tflops_per_second"]
    mfu = f"{measured['mfu']:.3f}" if measured["mfu"] else "–"
    of_ceiling = f"{tflops / ceiling:.3f}" if ceiling else "–"
    peak = f"{measured['peak_gib']:.1f}" if measured["peak_gib"] else "–"
    return f"| {label} | {rate:,.0f} | {tflops:.1f} | {mfu} | {of_ceiling} | {peak} | {ours / rate:.2f} x |\n"


def _notes_on(ours: dict[str, Any]) -> str:
    waits = [f"{ours[key]['waits_per_step']:.2f} ({label})" for label, key in (("dense", "none"), ("routed", "r_cla"))]
    return (
        f"\nOurs: bf16 parameters with fp32 masters, gradients and moments. Graphs compiled after the warm-up: "
        f"{ours['recompiled']}. Waits of the host for the GPU per step: {', '.join(waits)}; one is the reading of loss "
        "and norm at its end.\n\n"
    )


def _breakdown(ours: dict[str, Any]) -> str:
    rows = "| kernels | " + " | ".join(ours) + " |\n|---" + "|---" * len(ours) + "|\n"
    for group in next(iter(ours.values()))["milliseconds"]:
        times = [report["milliseconds"].get(group, 0.0) for report in ours.values()]
        rows += f"| {group} | " + " | ".join(f"{time:.1f}" for time in times) + " |\n"
    return f"\nGPU time of one step by group of kernels (ms):\n\n{rows}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--sequence-length", default="2048", metavar="N")
    parser.add_argument("--micro-batch", default="8", metavar="B")
    parser.add_argument("--accumulate", default="1", metavar="K", help="micro-batches a step (default: 1)")
    parser.add_argument("--steps", default="20", help="steps of each trainer (default: 20)")
    parser.add_argument("--warmup", default="5", help="before them (default: 5)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md")
    return parser


@entry_point
def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    read_shape(arguments.shape)  # refused here, not in each trainer's process
    batch = [f"--shape={arguments.shape}", f"--sequence-length={arguments.sequence_length}"]
    batch += [f"--micro-batch={arguments.micro_batch}", f"--accumulate={arguments.accumulate}"]
    batch += [f"--warmup={arguments.warmup}"]
    ceiling = _run("peers", ["--ceiling"]).get("tflops_per_second")
    steps = int(arguments.steps) + int(arguments.warmup)
    ours = _run("train", [*batch, f"--steps={steps}", "--rounds=1", "--profile"])
    text = (
        f"{datetime.date.today()}, {ours.get('device')}, {ours.get('software')}; bf16 matrix product of 8192^3: "
        f"{ceiling or 0:.0f} TFLOP/s\n\n`python -m skv_tools.bench.speed {' '.join(argv)}`\n\n{HEADER}"
    )
    routed = ours["r_cla"]["tokens_per_second"] if "r_cla" in ours else float("nan")
    for label, policy in (("dense", "none"), ("routed (r_cla 0.5)", "r_cla")):
        text += _row(f"ours, {label}", ours.get(policy, ours), ceiling, routed)
    arguments.out.write_text(text)  # after each trainer: the time for a call may run out
    notes = ""
    for label in arguments.peers:
        report = _run("peers", [*batch, *PEERS[label], f"--steps={arguments.steps}", "--clip=1.0"])
        text += _row(label, report, ceiling, routed)
        notes += f"- {label}: {report.get('description', 'not run')}\n"
        arguments.out.write_text(text)
    if "none" in ours:
        text += _notes_on(ours) + notes + _breakdown({policy: ours[policy] for policy in ("none", "r_cla")})
    arguments.out.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
