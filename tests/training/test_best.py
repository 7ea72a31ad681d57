"""The best checkpoint is kept, a run ends where nothing gets better, and evaluations before the first step."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.kinds import checkpoint_at
from skv_dist.training.callbacks import Best
from tests.support.jobs.loop import run_and_print, run_training
from tests.support.runs import losses
from tests.support.settings import run_settings
from tests.support.workers import JobFailedError


def test_lower_values_are_new_and_patience_ends() -> None:
    best = Best("loss@0.50", 2, says_so=False)
    seen = []
    for step, value in enumerate([3.0, 2.0, float("nan"), 2.5, 1.0], 1):
        best.on_step(step, {"eval/loss@0.50": value, "loss": 1.0})
        seen.append((best.is_new, best.finished))
    assert seen[:4] == [(True, False), (True, False), (False, False), (False, True)]
    again = Best("loss@0.50", 2, says_so=False)
    again.restore({**best.state(), "without": 2})
    again.on_start(5, 10)
    assert again.finished
    other = Best("loss@1.00", 2, says_so=False)
    other.restore(best.state())  # of another evaluation
    assert (other.step, other.without) == (0, 0)


def test_of_scores_the_highest_is_the_best() -> None:
    best = Best("token_f1@0.50", 2, says_so=False)
    seen = []
    for step, value in enumerate([30.0, 29.0, 31.0, 31.0, 30.5], 1):
        best.on_step(step, {"eval/token_f1@0.50": value, "eval/loss@0.50": -float(step)})
        seen.append((best.is_new, best.finished))
    assert seen == [(True, False), (False, False), (True, False), (False, False), (False, True)]
    assert (best.step, best.value) == (3, 31.0)
    assert Best("token_f1@0.50", 2, says_so=False).state()["value"] is None


def settings(text: Path, out: Path, **sections: Any) -> dict[str, Any]:
    """A rate so high that the loss rises again after some steps."""
    return run_settings(
        text,
        out,
        model={"num_layers": 2},
        optimizer={"lr": 0.15, "schedule": "constant"},
        **{
            **sections,
            "eval": {"every": 1, "best": "loss@0.50", **sections.get("eval", {})},
            "checkpoint": {"keep_last": 1, **sections.get("checkpoint", {})},
            "train": {"steps": 16, **sections.get("train", {})},
        },
    )


@pytest.fixture(scope="module")
def whole(workers: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    out = tmp_path_factory.mktemp("best") / "run"
    return out, *workers(2)(run_and_print, settings(text, out, eval={"patience": 3, "at_start": True}))[0]


def test_the_best_checkpoint_stays(whole: tuple[Path, list[dict[str, Any]], str]) -> None:
    out, lines, printed = whole
    values = {line["step"]: line["eval/loss@0.50"] for line in lines}
    best = min((value, step) for step, value in values.items() if step)[1]
    assert best < lines[-1]["step"]
    root = out / "checkpoints"
    assert (root / "best").read_text().strip() == files.folder_of(root, best).name
    assert {path.name for path in files.existing(root)} == {
        files.folder_of(root, step).name for step in (best, lines[-1]["step"])
    }
    assert checkpoint_at(root / "best") == files.folder_of(root, best)
    assert checkpoint_at(out) == files.folder_of(root, lines[-1]["step"])
    assert files.read_state(files.folder_of(root, best))["best"]["step"] == best
    assert lines[-1]["step"] == best + 3 < 16
    assert printed.count("the run ends (eval.patience)") == 1
    assert "stopped by" not in printed


def test_step_0_is_measured(whole: tuple[Path, list[dict[str, Any]], str]) -> None:
    _, lines, _ = whole
    assert lines[0].keys() == {"step", "time", *(name for name in lines[1] if name.startswith("eval/"))}
    assert [line["step"] for line in lines] == list(range(len(lines)))


def test_a_run_that_has_ended_so_does_not_go_on(
    workers: Any, text: Path, whole: tuple[Path, list[dict[str, Any]], str]
) -> None:
    out, lines, _ = whole
    again = workers(2)(run_training, settings(text, out, eval={"patience": 3, "at_start": True}))[0]
    assert again == lines
    assert (out / "checkpoints" / "best").exists()


def test_what_was_best_is_remembered(workers: Any, text: Path, tmp_path: Path) -> None:
    """A run in two parts keeps what the whole run keeps; rolled back, what was best by then."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    every = {"every": 2, "keep_last": None}
    expected = workers(1)(run_training, settings(text, whole, checkpoint=every))[0]
    steps = settings(text, parts, checkpoint={**every, "allow_changed": ["train.steps"]}, train={"steps": 16})
    first = {**steps, "train": {**steps["train"], "steps": 8}}
    workers(1)(run_training, first)
    found = workers(1)(run_training, steps)[0]
    assert losses(found) == losses(expected)
    kept = [(run / "checkpoints" / "best").read_text() for run in (whole, parts)]
    assert kept[0] == kept[1]
    back = files.folder_of(parts / "checkpoints", 2)
    short = {
        **steps,
        "train": {**steps["train"], "steps": 2},
        "checkpoint": {**steps["checkpoint"], "resume": str(back)},
    }
    workers(1)(run_training, short)
    assert int((parts / "checkpoints" / "best").read_text().strip()[5:]) <= 2


def test_a_best_checkpoint_that_was_not_written_costs_no_earlier_one(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        files.folder_of(tmp_path, step).mkdir()
        (files.folder_of(tmp_path, step) / files.MANIFEST).write_text("{}")
    files.set_best(tmp_path, 2)
    files.set_best(tmp_path, 5)  # its save had failed
    files.prune(tmp_path, 1, None)
    assert files.followed(tmp_path / "best") == files.folder_of(tmp_path, 2)
    assert files.existing(tmp_path) == [files.folder_of(tmp_path, 6), files.folder_of(tmp_path, 2)]
    shutil.rmtree(files.folder_of(tmp_path, 2))
    files.set_best(tmp_path, 5)
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"best": "loss@0.33"}, r"eval\.best 'loss@0\.33' is not measured: take one of loss@1\.00, loss@0\.50"),
        ({"best": None, "patience": 2}, r"eval\.patience is 2, but eval\.best is not set"),
        ({"every": 0}, r"eval\.best is 'loss@0\.50', but eval\.every is 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    workers: Any, text: Path, tmp_path: Path, evaluation: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobFailedError, match=message):
        workers(1)(run_training, settings(text, tmp_path / "run", eval=evaluation))
    assert not (tmp_path / "run").exists()


def test_checkpoints_come_by_the_clock(workers: Any, text: Path, tmp_path: Path) -> None:
    def saved(out: Path, **checkpoint: Any) -> list[int]:
        given = run_settings(text, out, model={"num_layers": 2}, checkpoint={"keep_last": None, **checkpoint})
        workers(2)(run_training, given)
        return sorted(files.step_of(path) for path in files.existing(out / "checkpoints"))

    assert saved(tmp_path / "often", every_minutes=1e-6) == [1, 2, 3, 4, 5, 6]
    assert saved(tmp_path / "never", every_minutes=0) == [6]
    assert saved(tmp_path / "steps", every=4, every_minutes=1e-6) == [4, 6]
    assert (
        json.loads((tmp_path / "often" / "metrics.jsonl").read_text().splitlines()[0])["checkpoint/stall_seconds"] > 0
    )
