"""A process of a pipeline is killed inside saves; `tests/long` kills all of them at random times, much more often."""

from pathlib import Path

from tests.support.killing import kill_inside_saves, killed_run


def test_a_killed_run_ends_like_an_undisturbed_one(text: Path, tmp_path: Path) -> None:
    seen = killed_run(
        tmp_path, text, 6, kill_inside_saves, 8, 2, parallel={"pipeline": 2, "zero_stage": 1}, model={"num_layers": 4}
    )
    assert seen["killed while running"] == 6
    assert seen["killed inside a save"] >= 3
    assert seen["resumed"] >= 3
