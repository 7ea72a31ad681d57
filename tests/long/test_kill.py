"""Killed again and again: one process, and two of a pipeline."""

from pathlib import Path
from typing import Any

import pytest

from tests.long.kill_run import STEPS_PER_KILL, kill_at_random_times
from tests.support.killing import Killer, kill_inside_saves, killed_run

PIPELINE = {"pipeline": 2, "zero_stage": 1}


@pytest.mark.parametrize(
    ("kill", "processes", "parallel"),
    [(kill_at_random_times, 1, {}), (kill_at_random_times, 2, PIPELINE), (kill_inside_saves, 2, {"zero_stage": 1})],
)
def test_a_run_killed_fifty_times_ends_like_an_undisturbed_one(
    text: Path, tmp_path: Path, kill: Killer, processes: int, parallel: dict[str, Any]
) -> None:
    seen = killed_run(tmp_path, text, 50, kill, STEPS_PER_KILL, processes, parallel=parallel)
    assert seen["resumed"] > 25
