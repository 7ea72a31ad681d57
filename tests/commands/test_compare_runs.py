"""The comparison of runs: the last evaluation of each, as a table and a plot."""

import json
import sys
from pathlib import Path

import pytest

from skv_dist.commands.evaluate import main


def write_run(folder: Path, *lines: dict[str, float]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["skv-eval", "compare", *map(str, arguments)])
    return main()


def test_the_last_evaluation_of_each_run_and_its_rise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    routed = write_run(
        tmp_path / "routed",
        {"step": 1, "eval/loss@1.00": 9.0, "eval/loss@0.50": 9.0, "eval/loss@0.25": 9.0},
        {
            "step": 2,
            "loss": 1.0,
            "eval/loss@1.00": 2.0,
            "eval/loss@1.00/books": 1.0,
            "eval/loss@0.50": 2.125,
            "eval/loss@0.25": 2.5,
        },
        {"step": 3, "loss": 0.5},
    )
    dense = write_run(tmp_path / "dense", {"step": 1, "eval/loss@0.50": 3.0, "eval/loss@1.00": 1.5})
    assert compare(monkeypatch, routed, dense, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "retention.md").read_text().splitlines() == [
        "| loss (nats/token) | 100% of the cache | 50% of the cache |",  # only what both have measured
        "|---|---|---|",
        "| routed | 2.000 | 2.125 (+0.125) |",
        "| dense | 1.500 | 3.000 (+1.500) |",
    ]
    assert (tmp_path / "out" / "retention.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_cannot_be_compared_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_run(tmp_path / "whole", {"eval/loss@1.00": 2.0})
    half = write_run(tmp_path / "half", {"eval/loss@0.50": 2.0})
    silent = write_run(tmp_path / "silent", {"step": 1, "loss": 1.0})
    broken = write_run(tmp_path / "broken")
    (broken / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n')
    for runs, message in (
        ([silent], f"{silent / 'metrics.jsonl'} holds no evaluation"),
        ([broken], f"{broken / 'metrics.jsonl'}:2: not JSON"),
        ([tmp_path / "gone"], f"cannot read {tmp_path / 'gone' / 'metrics.jsonl'}"),
        ([whole, half], "share no evaluation at retention 1.0"),
    ):
        assert compare(monkeypatch, *runs, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
