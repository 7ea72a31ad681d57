"""A process that is killed in the middle of a run: the others end soon, and say which one it was."""

import signal
from pathlib import Path

import pytest

from tests.support.processes import ended, wait_until
from tests.support.runs import has_stepped, start
from tests.support.settings import run_settings


@pytest.mark.parametrize(("victim", "how"), [(0, signal.SIGKILL), (3, signal.SIGKILL), (3, signal.SIGSTOP)])
def test_the_others_name_the_process_that_was_lost(
    text: Path, tmp_path: Path, victim: int, how: signal.Signals
) -> None:
    """Stopped, it fails no transfer of the others: they wait for it, as a GPU waits for a process that was killed."""
    given = run_settings(
        text,
        tmp_path / "run",
        parallel={"pipeline": 2, "zero_stage": 1, "timeout_minutes": 1.0},
        train={"steps": 100000, "tensorboard": False},
        eval={"every": 0},
    )
    commands = start(tmp_path / "run.yaml", given, 4)
    with ended(commands):
        wait_until(lambda: has_stepped(tmp_path / "run"), commands)
        commands[victim].send_signal(how)
        stage, replica = divmod(victim, 2)
        for rank, command in enumerate(commands):
            if rank != victim:
                assert command.wait() == 2, command.printed
                lost = f"contact was lost with rank {victim} (stage {stage}, replica {replica}, tensor"
                assert lost in command.printed
                assert "Traceback" not in command.printed
