"""Texts to train on, whole runs as processes, and what comes out of them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml


def write_text(folder: Path) -> None:
    """Forty small files to train on."""
    rng = np.random.default_rng(0)
    for number in range(40):
        words = rng.choice(["the", "cache", "of", "any", "layer", "may", "be", "cut\n"], 60)
        (folder / f"{number}.txt").write_text(" ".join(words))


def start(file: Path, given: dict[str, Any], processes: int = 1) -> list[subprocess.Popen[str]]:
    """``skv-train`` on ``given``, written to ``file``, as so many processes; each one's output is piped."""
    file.write_text(yaml.safe_dump(given))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        places = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": 1,
        }
        environment = {**os.environ, **{name: str(value) for name, value in places.items()}}
        command = [sys.executable, "-m", "skv_dist.commands.train", str(file)]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        )
    return started


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines] + [v for line in lines for k, v in line.items() if k.startswith("eval/")]
