"""Every parallel layout against one process, cell by cell: ``python -m tests.long.parity_matrix --out FILE``.

TP x SP x PP x VPP x DP x ZeRO x recompute x routing, 720 cells. Each compares the loss and every gradient of one batch,
and the losses, gradient norms and parameters of three optimizer steps after it, with one process (fp32, relative to the
largest entry of each tensor). The suite runs a part of them; this runs all, in hours on a few cores. Rows are written
as they are found.
"""

import argparse
import datetime
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.compare import TOLERANCE, worst
from tests.support.jobs import parity
from tests.support.settings import config
from tests.support.workers import Pools

POLICIES: dict[str, dict[str, Any]] = {
    "none": {"policy": "none"},
    "r_cla": {"policy": "r_cla", "cross_prob": 0.6},
    "suffix": {"policy": "suffix", "shared_layers": 3},
    "cla": {"policy": "cla", "group_size": 2},
}
COLUMNS = ["TP", "SP", "PP", "VPP", "DP", "ZeRO", "recompute", "routing", "loss", "gradients", "norm", "parameters"]


def cells() -> Iterator[tuple[int, dict[str, Any], str, str]]:
    """(processes, parallel section, recompute, policy), few processes first."""
    splits = [
        (tensor * pipeline * replicas, tensor, sp, pipeline, virtual)
        for tensor, sp in ((1, False), (2, False), (2, True))
        for pipeline, virtual in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2))
        for replicas in (1, 2)
    ]
    for processes, tensor, sp, pipeline, virtual in sorted(splits):
        for zero, recompute, policy in itertools.product(range(3), ("none", "full"), POLICIES):
            parallel = {
                "tensor": tensor,
                "sequence_parallel": sp,
                "pipeline": pipeline,
                "virtual_pipeline": virtual,
                "zero_stage": zero,
            }
            yield processes, parallel, recompute, policy


def relative(found: list[float], expected: list[float]) -> float:
    return float(np.max(np.abs(np.array(found) - expected) / np.abs(expected)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--min-processes", type=int, default=1)
    parser.add_argument("--max-processes", type=int, default=16)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first n of these cells (run before)")
    parser.add_argument("--every", type=int, default=1, help="only every n-th of these cells")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    arguments = parser.parse_args()
    began = time.monotonic()

    import importlib.metadata
    import platform

    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "megatron-core", "deepspeed"))
    chosen = [c for c in cells() if arguments.min_processes <= c[0] <= arguments.max_processes]
    chosen = chosen[arguments.skip :: arguments.every]
    workers = Pools()

    def train(processes: int, parallel: dict[str, Any], recompute: str, policy: str) -> dict[str, Any]:
        # Micro-batches of one sample: four stages with chunks want at least four of them on each of two replicas.
        settings = {"recompute": recompute, "micro_batch_size": 1}
        job = config(parallel=parallel, train=settings, routing=POLICIES[policy])
        return workers(processes)(parity.train, job, 3)[0]

    expected = {policy: train(1, {"zero_stage": 0}, "none", policy) for policy in POLICIES}
    bad = done = 0
    with arguments.out.open("w") as file:
        file.write(
            f"{datetime.date.today()}, Python {platform.python_version()}, {versions}, CPU. Largest relative errors; "
            f"the limit is {TOLERANCE:g} for loss, gradients and norm.\n\n"
            f"`python -m tests.long.parity_matrix {' '.join(sys.argv[1:])}`\n\n"
            f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
        )
        for processes, parallel, recompute, policy in chosen:
            if time.monotonic() - began > arguments.seconds:
                break
            found, right = train(processes, parallel, recompute, policy), expected[policy]
            errors = [
                relative(found["losses"], right["losses"]),
                worst(found["gradients"], right["gradients"])[0],
                relative(found["norms"], right["norms"]),
                worst(found["parameters"], right["parameters"])[0],
            ]
            replicas = processes // (parallel["tensor"] * parallel["pipeline"])
            row = [
                parallel["tensor"],
                "yes" if parallel["sequence_parallel"] else "no",
                parallel["pipeline"],
                parallel["virtual_pipeline"],
                replicas,
                parallel["zero_stage"],
                recompute,
                policy,
                *(f"{error:.1e}" for error in errors),
            ]
            # Adam magnifies rounding in the parameters where a gradient is nearly zero (tests/parallel/test_parity.py).
            wrong = max(errors[:3]) > TOLERANCE or errors[3] > 20 * TOLERANCE
            bad, done = bad + wrong, done + 1
            file.write(f"| {' | '.join(map(str, row))} |{' **over the limit**' if wrong else ''}\n")
            file.flush()
        file.write(f"\n{done} of {len(chosen)} cells, {bad} over the limit.\n")
    print(f"{done} of {len(chosen)} cells, {bad} over the limit: {arguments.out}")
    workers.close()
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
