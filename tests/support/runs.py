"""Texts to train on, whole runs as processes, and what comes out of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.support.hosts import Host, entering
from tests.support.processes import Command, free_port, places

TRAIN, EVALUATE = "skv_dist.commands.train", "skv_dist.commands.evaluate"


def write_text(folder: Path) -> None:
    """Forty small files to train on."""
    rng = np.random.default_rng(0)
    for number in range(40):
        words = rng.choice(["the", "cache", "of", "any", "layer", "may", "be", "cut\n"], 60)
        (folder / f"{number}.txt").write_text(" ".join(words))


def start(
    file: Path, given: dict[str, Any], processes: int = 1, first: Mapping[int, Callable[[], None]] | None = None
) -> list[Command]:
    """``skv-train`` on ``given``, written to ``file``, as so many processes; ``first``: what a rank does before."""
    file.write_text(yaml.safe_dump(given))
    port = free_port()
    return [
        Command(
            TRAIN,
            [str(file)],
            places(rank, processes, port),
            file.with_suffix(f".{rank}.log"),
            first=(first or {}).get(rank),
        )
        for rank in range(processes)
    ]


def start_across(
    hosts: Sequence[Host],
    file: Path,
    given: dict[str, Any],
    processes: int = 1,
    first: Mapping[int, Callable[[], None]] | None = None,
) -> list[Command]:
    """As `start`, with the processes spread evenly over ``hosts``, neighbours together."""
    file.write_text(yaml.safe_dump(given))
    each = processes // len(hosts)
    port = free_port()
    return [
        Command(
            TRAIN,
            [str(file)],
            {
                **places(rank, processes, port),
                "LOCAL_RANK": str(rank % each),
                "MASTER_ADDR": hosts[0].address,
            },
            file.with_suffix(f".{rank}.log"),
            first=(first or {}).get(rank),
            enter=entering(hosts[rank // each]),
        )
        for rank in range(processes)
    ]


def has_stepped(out: Path, steps: int = 3) -> bool:
    metrics = out / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= steps


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines] + [v for line in lines for k, v in line.items() if k.startswith("eval/")]
