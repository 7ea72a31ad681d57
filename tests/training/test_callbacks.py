"""What records a run, on a disk that is full."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.summary.writer import record_writer

from skv_dist.training.callbacks import TensorBoard


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
