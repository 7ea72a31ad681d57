"""Killed again and again: one process, and two of a pipeline."""

from pathlib import Path
from typing import Any

import pytest

from tests.long.kill_run import killed_run


@pytest.mark.parametrize(("processes", "parallel"), [(1, {}), (2, {"pipeline": 2, "zero_stage": 1})])
def test_a_run_killed_fifty_times_ends_like_an_undisturbed_one(
    text: Path, tmp_path: Path, processes: int, parallel: dict[str, Any]
) -> None:
    seen = killed_run(tmp_path, text, 50, processes=processes, parallel=parallel)
    assert seen["killed while running"] >= 40
    assert seen["resumed"] >= 40
