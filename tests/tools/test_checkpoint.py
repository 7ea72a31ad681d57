"""`skv-checkpoint` on a small run."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from skv_tools.checkpoint.cli import main

from tests.support.jobs.loop import run_training
from tests.support.settings import run_settings


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["skv-checkpoint", *map(str, arguments)])
    return main()


def test_inspect_export_prune(
    workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a few words\n" * 300)
    run = tmp_path / "run"
    keep = {"every": 1, "keep_last": None}
    given = run_settings(
        tmp_path,
        run,
        train={"steps": 3},
        eval={"every": 0},
        checkpoint=keep,
        parallel={"tensor": 2, "zero_stage": 2},
        data={"validation_fraction": 0},
    )
    workers(2)(run_training, given)
    last = run / "checkpoints" / "step_00000003"
    assert call(monkeypatch, "inspect", last, "--tensors") == 0
    printed = capsys.readouterr().out
    assert "3, 24 samples, 3 updates" in printed
    assert "tensor 2, zero_stage 2" in printed
    assert "exp_avg.layers.7.mlp.linear_fc2.weight  [32, 48]" in printed

    assert call(monkeypatch, "export", last, tmp_path / "out") == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["embedding.weight"].shape == (259, 32)
    assert all(np.isfinite(value).all() for value in weights.values())
    assert call(monkeypatch, "export", last, tmp_path / "out") == 2

    assert call(monkeypatch, "prune", run, "--keep-last", 1) == 0
    assert [path.name for path in sorted((run / "checkpoints").glob("step_*"))] == ["step_00000003"]
    (last / "state.json").unlink()
    assert call(monkeypatch, "inspect", last) == 2
    assert "state.json is missing" in capsys.readouterr().err
