"""A process that is killed in the middle of a run: the others end soon, and say which one it was."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import start
from tests.support.settings import config

TIMEOUT_MINUTES = 1.0


@pytest.mark.parametrize(("victim", "how"), [(0, signal.SIGKILL), (3, signal.SIGKILL), (3, signal.SIGSTOP)])
def test_the_others_name_the_process_that_was_lost(tmp_path: Path, victim: int, how: signal.Signals) -> None:
    """Stopped, it fails no transfer of the others: they wait for it, as a GPU waits for a process that was killed."""
    (tmp_path / "text.txt").write_text("a few words\n" * 500)
    given: dict[str, Any] = config(
        data={
            "sources": [{"path": str(tmp_path / "text.txt"), "format": "text"}],
            "cache_dir": str(tmp_path / "cache"),
            "validation_fraction": 0,
        },
        parallel={"pipeline": 2, "zero_stage": 1, "timeout_minutes": TIMEOUT_MINUTES},
        train={"steps": 100000, "output_dir": str(tmp_path / "run"), "progress": False, "tensorboard": False},
        eval={"every": 0},
    )
    processes = start(tmp_path / "run.yaml", given, 4)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not (metrics.exists() and metrics.read_text().count("\n") > 2):
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.2)
        processes[victim].send_signal(how)
        for rank, process in enumerate(processes):
            if rank == victim:
                continue
            printed, _ = process.communicate(timeout=60 * TIMEOUT_MINUTES + 30)
            assert process.returncode == 2, printed
            stage, replica = divmod(victim, 2)
            assert f"contact was lost with rank {victim} (stage {stage}, replica {replica}, tensor" in printed
            assert "Traceback" not in printed
    finally:
        for process in processes:
            process.kill()
