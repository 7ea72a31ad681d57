"""What records a run: on a disk that is full, and in Weights & Biases."""

import errno
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.summary.writer import record_writer

from skv_dist.commands import train
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.training.callbacks import TensorBoard
from skv_dist.training.weights_and_biases import WeightsAndBiases
from tests.support.settings import run_settings


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # takes the place of the traceback
def test_a_full_disk_ends_tensorboard_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its own thread finds out, whose traceback nobody wants."""
    board = TensorBoard(tmp_path / "tensorboard")
    board.on_start(0, 100)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    for step in range(1, 20):
        board.on_step(step, {"loss": 1.0})
        time.sleep(0.05)
    board.on_end()
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        f"{tmp_path}/tensorboard cannot be written: No space left on device; going on without, "
        "metrics.jsonl has the numbers"
    ]
    assert err == ""


class _Wandb(SimpleNamespace):
    """What of wandb a run uses."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__(asked=[], logged=[], finished=0, fails="")

    def init(self, **asked: Any) -> "_Wandb":
        self.asked.append(asked)
        if self.fails:
            raise self.Error(f"{self.fails}\nmore of it")
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, numbers: dict[str, float]) -> None:
        self.logged.append(numbers)

    def finish(self) -> None:
        self.finished += 1


def test_a_run_that_goes_on_adds_to_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for steps in ([1, 2], [2, 3]):  # the second begins behind a checkpoint of step 1
        sender = WeightsAndBiases("project", tmp_path, {"train": {"steps": 3}})
        sender.on_start(steps[0] - 1, 3)
        for step in steps:
            sender.on_step(step, {"loss": 1.0 / step})
        sender.on_end()
    assert [numbers["step"] for numbers in wandb.logged] == [1, 2, 2, 3]
    assert wandb.logged[-1] == {"step": 3, "loss": 1 / 3}
    first, second = wandb.asked
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("project", tmp_path.name, "allow")
    assert first["id"]
    assert wandb.finished == 2


def test_a_record_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = _Wandb()
    wandb.fails = "no login"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sender = WeightsAndBiases("project", tmp_path, {})
    sender.on_start(0, 2)
    sender.on_step(1, {"loss": 1.0})
    sender.on_end()
    assert capsys.readouterr().out == "train.wandb: no login; going on without, metrics.jsonl has the numbers\n"
    assert not wandb.logged


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)], ids=["nothing", "a folder of that name"])
def test_without_the_package_a_run_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: object
) -> None:
    monkeypatch.setattr(train, "find_spec", lambda name: found)
    run = RunConfig.model_validate(run_settings(tmp_path / "text.txt", tmp_path / "run", train={"wandb": "project"}))
    with pytest.raises(UserError, match="but the package wandb is not installed"):
        train.train(run)
