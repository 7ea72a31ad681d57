"""Runs whose length is given in epochs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.jobs.loop import run_and_print, run_training
from tests.support.runs import losses
from tests.support.settings import GLOBAL_BATCH, run_settings
from tests.support.workers import JobFailedError


def settings(text: Path, out: Path, epochs: float | None = 0.5, **sections: Any) -> dict[str, Any]:
    given = run_settings(
        text,
        out,
        **{
            **sections,
            "model": {"num_layers": 2},
            "routing": {"start": 0.25, "ramp": 0.5},
            "eval": {"every": 0},
            "train": {"epochs": epochs, "global_batch_size": 64, **sections.get("train", {})},
        },
    )
    if epochs is not None and "steps" not in sections.get("train", {}):
        del given["train"]["steps"]
    return given


def test_steps_follow_from_epochs(workers: Any, text: Path, tmp_path: Path) -> None:
    lines, printed = workers(2)(run_and_print, settings(text, tmp_path / "run"))[0]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    steps = config["train"]["steps"]
    assert steps == lines[-1]["step"] >= 3
    number = round(64 / lines[0]["epoch"])
    assert f"{number:,} sequences for training" in printed
    assert steps == math.ceil(number / 2 / 64)
    assert 0.5 <= lines[-1]["epoch"] < 0.5 + 64 / number
    # The schedules know the steps: a run of as many is the same.
    same = workers(2)(run_training, settings(text, tmp_path / "steps", None, train={"steps": steps}))[0]
    assert losses(lines) == losses(same)
    assert [line["lr"] for line in lines] == [line["lr"] for line in same]


def test_a_run_goes_on_to_more_epochs_and_with_another_batch(workers: Any, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = workers(1)(run_training, settings(text, out))[0]
    with pytest.raises(JobFailedError, match=r"train\.epochs was 0\.5 and is 1\.0"):
        workers(1)(run_training, settings(text, out, 1.0))
    allowed = {"allow_changed": ["train.epochs", "train.global_batch_size"]}
    second = workers(1)(
        run_training, settings(text, out, 1.0, checkpoint=allowed, train={"global_batch_size": GLOBAL_BATCH * 4})
    )[0]
    number = 64 / first[0]["epoch"]
    assert 1.0 <= second[-1]["epoch"] < 1.0 + GLOBAL_BATCH * 4 / number
    done = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert done["epoch"] == second[-1]["epoch"]


def test_the_configuration_of_a_run_repeats_it(workers: Any, text: Path, tmp_path: Path) -> None:
    lines = workers(1)(run_training, settings(text, tmp_path / "one"))[0]
    given = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    given["train"]["output_dir"] = str(tmp_path / "two")
    assert losses(workers(1)(run_training, given)[0]) == losses(lines)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"train": {"steps": 1000}},
            r"train\.steps 1000 and train\.epochs 0\.5 \(\d+ steps of 64 of the .* say two things",
        ),
        ({"data": {"streaming": True}}, r"train\.epochs 0\.5 and data\.streaming: true do not work together"),
    ],
)
def test_what_does_not_go_together_is_refused(
    workers: Any, text: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises((JobFailedError, ValueError), match=message):
        workers(1)(run_training, settings(text, tmp_path / "run", **changed))
    assert not (tmp_path / "run").exists()
