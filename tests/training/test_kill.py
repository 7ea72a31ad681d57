"""`kill -9` at random moments, inside saves too: the run goes on from its last complete checkpoint, bit by bit.

``SKV_KILLS=50 pytest tests/training/test_kill.py`` kills fifty times.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from skv_dist.training import checkpoint_files as files
from skv_dist.training.checkpoint import read_tensors, tensor_shapes
from tests.training.runs import losses, settings

KILLS = int(os.environ.get("SKV_KILLS", "4"))
STEPS = 50 * KILLS


def start(folder: Path, given: dict[str, Any]) -> subprocess.Popen[str]:
    file = folder / f"{Path(given['train']['output_dir']).name}.yaml"
    file.write_text(yaml.safe_dump(given))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "skv_dist.training.cli", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=environment,
    )


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    return printed


def test_a_killed_run_ends_like_an_undisturbed_one(text: Path, tmp_path: Path) -> None:
    def given(name: str) -> dict[str, Any]:
        return settings(
            text, tmp_path / name, checkpoint={"every": 2}, eval={"every": 0},
            train={"steps": STEPS, "tensorboard": False},
        )  # fmt: skip

    finish(start(tmp_path, given("whole")))
    out = tmp_path / "killed"
    root = out / "checkpoints"
    chance = random.Random(0)
    resumed = 0
    for _ in range(KILLS):
        before = (out / "metrics.jsonl").stat().st_size if out.exists() else 0
        process = start(tmp_path, given("killed"))
        while process.poll() is None and not (
            (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > before + 300
        ):
            time.sleep(0.01)
            if (out / "metrics.jsonl").exists():
                before = min(before, (out / "metrics.jsonl").stat().st_size)  # cut back to the checkpoint at resume
        time.sleep(chance.uniform(0, 1.0))
        process.send_signal(signal.SIGKILL)
        printed, _ = process.communicate()
        assert "is damaged" not in printed
        resumed += "resumed from" in printed
        for folder in files.existing(root):
            files.verify(folder)  # what is visible is whole
    printed = finish(start(tmp_path, given("killed")))
    assert "resumed from" in printed
    assert resumed >= KILLS - 1

    assert [line["step"] for line in lines_of(out)] == list(range(1, STEPS + 1))
    assert losses(lines_of(out)) == losses(lines_of(tmp_path / "whole"))
    ends = [files.folder_of(tmp_path / name / "checkpoints", STEPS) for name in ("killed", "whole")]
    names = list(tensor_shapes(ends[0]))
    found, expected = (read_tensors(end, names) for end in ends)
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")]
