"""Whole runs: determinism, the order of samples, the guard, skipped updates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.jobs import parity
from tests.support.jobs.loop import (
    host_reads,
    run_and_print,
    run_training,
    steps_before_data_fail,
    steps_until_sigterm_within,
)
from tests.support.layouts import SMALL
from tests.support.runs import losses
from tests.support.settings import GLOBAL_BATCH, config, run_settings
from tests.support.workers import JobFailedError


def test_runs_repeat_bitwise_and_do_not_depend_on_the_number_of_replicas(
    workers: Any, text: Path, tmp_path: Path
) -> None:
    def run(name: str, processes: int, **sections: Any) -> list[dict[str, Any]]:
        given = run_settings(text, tmp_path / name, model=SMALL, **sections)
        return workers(processes)(run_training, given)[0]

    one = run("a", 1)
    again = run("b", 1)
    assert losses(one) == losses(again)
    assert [line["step"] for line in one] == list(range(1, 7))
    expected = {"loss", "grad_norm", "lr", "tokens", "tokens_per_second", "peak_memory_bytes", "skipped", "step"}
    assert expected <= one[0].keys()
    assert "eval/loss@0.50" in one[2]
    assert "eval/loss@1.00" in one[5]

    two = run("c", 2)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    tensor = {"tensor": 2, "sequence_parallel": True}
    split = run("d", 2, parallel=tensor)
    np.testing.assert_allclose(losses(split), losses(one), rtol=1e-5)
    twice = run("e", 2, parallel=tensor)
    assert losses(split) == losses(twice)
    other = run("f", 1, train={"seed": 8})
    assert losses(other) != losses(one)


@pytest.mark.parametrize("virtual", [1, 2])
def test_a_pipeline_gives_the_run_of_one_process(workers: Any, text: Path, tmp_path: Path, virtual: int) -> None:
    one = workers(1)(run_training, run_settings(text, tmp_path / "one"))[0]
    parallel = {"pipeline": 2, "virtual_pipeline": virtual, "zero_stage": 2}
    given = run_settings(text, tmp_path / "two", parallel=parallel)
    two = workers(2)(run_training, given)[0]
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)

    assert all(line["wire_bytes"] > 0 for line in two)


def test_a_finished_run_says_so_and_may_grow(workers: Any, text: Path, tmp_path: Path) -> None:
    def run(steps: int, **sections: Any) -> tuple[list[dict[str, Any]], str]:
        settings = run_settings(text, tmp_path / "run", train={"steps": steps}, eval={"every": 0}, **sections)
        lines, printed = workers(1)(run_and_print, settings)[0]
        return lines, printed

    first, printed = run(2)
    assert "this run is finished" not in printed
    again, printed = run(2)
    assert again == first
    assert "this run is finished: all of its 2 steps are done; to train on, raise train.steps" in printed
    longer, printed = run(4)
    assert longer[:2] == first
    assert [line["step"] for line in longer] == [1, 2, 3, 4]
    assert "train.steps grew from 2 to 4" in printed
    assert longer[2]["lr"] > longer[3]["lr"] > 0
    with pytest.raises(JobFailedError, match=r"belongs to another run: train\.steps was 4 and is 3"):
        run(3)


def test_a_run_is_not_written_over(workers: Any, text: Path, tmp_path: Path) -> None:
    workers(1)(run_training, run_settings(text, tmp_path / "a", train={"steps": 2}))
    before = (tmp_path / "a" / "metrics.jsonl").read_text()
    with pytest.raises(JobFailedError, match="already holds a run"):
        workers(1)(run_training, run_settings(text, tmp_path / "a", checkpoint={"resume": "never"}))
    with pytest.raises(JobFailedError, match=r"train\.steps was 2 and is 1"):
        workers(1)(run_training, run_settings(text, tmp_path / "a", train={"steps": 1}))
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == before


def test_the_guard_ends_a_run_with_one_line(workers: Any, text: Path, tmp_path: Path) -> None:
    hard = {"spike_factor": 1.0001, "spike_window": 2, "max_skipped_steps": 2, "steps": 200}
    with pytest.raises(JobFailedError, match="2 steps in a row were skipped") as caught:
        workers(1)(run_training, run_settings(text, tmp_path / "a", train=hard))
    assert caught.value.kind == "UserError"
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["skipped"] >= 1


@pytest.mark.parametrize(("zero", "engine"), [*((zero, "deepspeed") for zero in range(4)), (1, "fsdp"), (3, "fsdp")])
def test_a_skipped_update_leaves_nothing_behind(workers: Any, zero: int, engine: str) -> None:
    dense: dict[str, Any] = {"model": SMALL, "routing": {"policy": "none", "cross_prob": 0.0}}
    parallel = {"zero_stage": zero, "engine": engine}
    checks, norm = workers(2)(parity.skip_update, config(parallel=parallel, **dense))[0]
    assert checks == [True, True, True, True]
    single = config(parallel={"zero_stage": 0}, **dense)
    assert norm == pytest.approx(workers(1)(parity.skip_update, single)[0][1], rel=1e-5)


def test_a_signal_within_a_step_ends_the_run_after_that_step(workers: Any) -> None:
    settings = config(parallel={"zero_stage": 0}, train={"steps": 5})
    assert workers(1)(steps_until_sigterm_within, settings, 3)[0] == (3, "SIGTERM")


@pytest.mark.parametrize(
    ("processes", "parallel", "compiled"),
    [
        (1, {"zero_stage": 0}, False),
        (1, {"zero_stage": 0}, True),
        (2, {"zero_stage": 1, "engine": "fsdp"}, False),
        (2, {"zero_stage": 3, "engine": "fsdp"}, False),
    ],
)
def test_the_host_does_not_read_the_device_while_it_launches_a_step(
    workers: Any, processes: int, parallel: dict[str, Any], compiled: bool
) -> None:
    given = config(parallel=parallel, train={"compile": compiled})
    assert workers(processes)(host_reads, given) == [0] * processes


def test_steps_before_unreadable_data_are_recorded(workers: Any) -> None:
    given = config(train={"steps": 6})
    assert workers(1)(steps_before_data_fail, given, 3 * GLOBAL_BATCH)[0] == [1, 2, 3]
