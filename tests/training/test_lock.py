"""One run at a time in a folder, which all processes must see."""

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from skv_dist.training import lock
from tests.support.jobs.lock import hold, hold_where_the_second_sees_nothing

HOST = socket.gethostname()


def write(folder: Path, **holder: Any) -> None:
    content = {"host": HOST, "pid": os.getpid(), "began": "then", "token": "other", **holder}
    (folder / lock.LOCK).write_text(json.dumps(content))


def test_a_folder_in_use_is_refused(workers: Any, tmp_path: Path) -> None:
    write(tmp_path, process=lock._process(os.getpid()))
    before = (tmp_path / lock.LOCK).read_text()
    errors = workers(2)(hold, str(tmp_path))
    expected = f"train.output_dir {tmp_path} is in use by process {os.getpid()} on {HOST}, which began at then"
    assert errors == [f"{expected}: wait for it or choose another folder"] * 2
    assert (tmp_path / lock.LOCK).read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK]


def test_the_lock_of_another_host_is_refused_with_the_cure(workers: Any, tmp_path: Path) -> None:
    write(tmp_path, host="elsewhere")
    error = workers(1)(hold, str(tmp_path))[0]
    assert f"if that run has ended, remove {tmp_path / lock.LOCK}; else wait" in error


def test_a_lock_that_was_left_behind_is_taken_over(workers: Any, tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    process = lock._process(gone.pid)
    while process != "ended":  # not yet buried: its id is still taken
        process = lock._process(gone.pid)
    for holder in ({"pid": gone.pid, "process": "before"}, {"process": "of the boot before"}):
        write(tmp_path, **holder)
        assert workers(2)(hold, str(tmp_path)) == [None, None]
        assert list(tmp_path.iterdir()) == []
    gone.wait()
    write(tmp_path, pid=gone.pid)
    assert workers(1)(hold, str(tmp_path)) == [None]
    (tmp_path / lock.LOCK).touch()  # cut off
    assert workers(1)(hold, str(tmp_path)) == [None]


def test_a_requeued_job_has_ended_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = {"host": "elsewhere", "pid": 1, "job": lock._job()}
    assert not lock._has_ended(before)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert lock._has_ended(before)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert not lock._has_ended(before)


def test_a_folder_that_is_not_shared_is_named(workers: Any, tmp_path: Path) -> None:
    errors = workers(2)(hold_where_the_second_sees_nothing, str(tmp_path))
    assert len(set(errors)) == 1
    assert (
        f"train.output_dir {tmp_path} is not one folder for all processes: rank 1 on {HOST} does not see" in errors[0]
    )
    assert list(tmp_path.iterdir()) == []
