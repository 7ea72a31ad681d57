"""Short form of `tests.long.kill_run`, and of two processes of a pipeline at that."""

from pathlib import Path

from tests.long.kill_run import killed_run


def test_a_killed_run_ends_like_an_undisturbed_one(text: Path, tmp_path: Path) -> None:
    seen = killed_run(tmp_path, text, 4, processes=2, parallel={"pipeline": 2, "zero_stage": 1})
    assert seen["killed while running"] >= 3
    assert seen["resumed"] >= 2
