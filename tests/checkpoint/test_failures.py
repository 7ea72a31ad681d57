"""Saves that fail, and runs that end while one is under way: what is lost is said, and never reported as success."""

from pathlib import Path
from typing import Any

import pytest
import torch

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.save import write_alone
from skv_dist.files import unfinished_path
from skv_dist.training.callbacks import JsonLines
from tests.support.jobs.checkpoint import run_and_report, run_that_fails_while_saving, run_where_metrics_do_not_fit
from tests.support.runs import lines_of
from tests.support.settings import run_settings


def settings(text: Path, out: Path, **checkpoint: Any) -> dict[str, Any]:
    return run_settings(text, out, checkpoint=checkpoint, train={"steps": 4}, eval={"every": 0})


def test_a_last_save_that_fails_is_an_error(workers: Any, text: Path, tmp_path: Path) -> None:
    printed, error = workers(1)(run_and_report, settings(text, tmp_path / "run"), [4])[0]
    folder = files.folder_of(tmp_path / "run" / "checkpoints", 4)
    problem = f"checkpoint {folder} could not be written (No space left on device)"
    assert error == f"{problem}: what was trained after the start is lost; mend that and start the run again"
    assert list(folder.parent.iterdir()) == []
    assert "saved" not in printed


def test_a_save_on_the_way_that_fails_ends_nothing(workers: Any, text: Path, tmp_path: Path) -> None:
    """But the last one does, and it is tried again where the one of the last step failed."""
    given = settings(text, tmp_path / "run", every=2)
    printed, error = workers(1)(run_and_report, given, [2])[0]
    assert error is None
    assert "step 2: checkpoint" in printed
    assert "(No space left on device); going on without" in printed
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [files.LATEST, "step_00000004"]

    given = settings(text, tmp_path / "other", every=2, at_end=False)
    printed, error = workers(1)(run_and_report, given, [4])[0]
    assert error is not None
    assert "what was trained after step 2 is lost" in error


def test_metrics_that_do_not_fit_end_the_run_with_a_checkpoint(workers: Any, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    printed, error = workers(1)(run_where_metrics_do_not_fit, settings(text, out), 2)[0]
    problem = f"{out / 'metrics.jsonl'} cannot be written: No space left on device"
    assert printed.count(problem) == 1
    lost = "and the lines of the last 2 steps are lost"
    assert error == f"{problem}, {lost}; the run was ended after step 3; mend that and start the run again"
    files.verify(files.folder_of(out / "checkpoints", 3))
    assert [line["step"] for line in lines_of(out)] == [1]  # no part of a line

    assert workers(1)(run_and_report, settings(text, out), [])[0][1] is None
    assert [line["step"] for line in lines_of(out)] == [1, 4]


def test_lines_that_found_no_room_are_tried_again(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.on_start(0, 2)
    real = lines._file
    with open("/dev/full", "ab", buffering=0) as full:
        lines._file = full
        lines.on_step(1, {"loss": 1.0})
    assert lines.stop_reason is not None
    lines._file = real
    lines.on_step(2, {"loss": 2.0})
    lines.on_end()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_a_save_under_way_is_waited_for(workers: Any, text: Path, tmp_path: Path) -> None:
    _, error = workers(1)(run_that_fails_while_saving, settings(text, tmp_path / "run", every=1))[0]
    assert error == "the data are broken"
    root = tmp_path / "run" / "checkpoints"
    files.verify(files.folder_of(root, 1))
    assert (root / files.LATEST).read_text() == "step_00000001\n"


def test_tools_that_cannot_write_say_so(tmp_path: Path) -> None:
    """DCP's own class is no Exception: it would pass by whoever waits for one."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        write_alone(tmp_path / "file" / "folder", {"model.a": torch.zeros(2)})


@pytest.mark.parametrize("elsewhere", ["missing", "cut"])
def test_files_that_are_not_whole_here_are_not_published(tmp_path: Path, elsewhere: str) -> None:
    """As where another host wrote them to its own disk."""
    folder = files.folder_of(tmp_path, 1)
    unfinished = unfinished_path(folder)
    unfinished.mkdir()
    files.write_state(unfinished, {"step": 1})
    written = unfinished / "__1_0.distcp"
    written.write_bytes(b"tensors")
    manifest = {path.name: files.digest(path) for path in unfinished.iterdir()}
    if elsewhere == "cut":
        written.write_bytes(b"")
    else:
        written.unlink()
    with pytest.raises(OSError, match=r"__1_0\.distcp is not whole where"):
        files.publish(folder, manifest)
    assert [path.name for path in tmp_path.iterdir()] == [unfinished.name]
    written.write_bytes(b"tensors")
    files.publish(folder, manifest)
    files.verify(folder)
