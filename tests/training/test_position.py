"""The position in the data: counted in samples, met without a time limit."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.engine import built, made_engine
from tests.support.jobs.loop import run_training
from tests.support.runs import losses
from tests.support.settings import SEQUENCE, config, run_settings
from tests.support.workers import JobFailedError


def positions_read(settings: dict[str, Any], state: dict[str, Any]) -> tuple[list[int], list[int], dict[str, Any]]:
    """Which samples a run that goes on from ``state`` reads, the ``tokens`` of its steps, and its state at the end."""
    from skv_dist.config.run import derive
    from skv_dist.data.packing import Sample
    from skv_dist.training.callbacks import Callback, Metrics
    from skv_dist.training.trainer import Trainer

    read: list[int] = []
    tokens: list[int] = []

    class Recorded:
        def __getitem__(self, position: int) -> Sample:
            read.append(position)
            return Sample(np.arange(SEQUENCE + 1), np.zeros(SEQUENCE + 1, np.int64))

    class Listener(Callback):
        def on_step(self, step: int, metrics: Metrics) -> None:
            tokens.append(int(metrics["tokens"]))

    with built(settings) as (run, world), made_engine(run, world) as engine:
        trainer = Trainer(run, derive(run, world.size), world, engine, Recorded())
        trainer.restore({**trainer.state(), **state})
        trainer.fit([Listener()])
        return read, tokens, trainer.state()


def test_another_batch_size_repeats_and_skips_nothing(workers: Any) -> None:
    settings = config(train={"steps": 5, "global_batch_size": 4})
    read, tokens, state = workers(1)(positions_read, settings, {"step": 3, "samples": 24, "tokens": 24 * SEQUENCE})[0]
    assert read == list(range(24, 32))
    assert tokens == [28 * SEQUENCE, 32 * SEQUENCE]
    assert (state["step"], state["samples"]) == (5, 32)


def test_another_sequence_length_is_refused(workers: Any, text: Path, tmp_path: Path) -> None:
    key = "data.sequence_length"
    workers(1)(run_training, run_settings(text, tmp_path / "a", train={"steps": 1}))
    given = run_settings(text, tmp_path / "a", data={"sequence_length": 8}, train={"steps": 1})
    given["checkpoint"] = {"allow_changed": [key]}
    with pytest.raises(JobFailedError, match=rf"{key} was 16 and is 8.*checkpoint\.init_from"):
        workers(1)(run_training, given)


def test_a_run_does_not_depend_on_where_its_data_lies(workers: Any, text: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in text.glob("*.txt"):
        (moved / file.name).write_bytes(file.read_bytes())
    here, there = (workers(1)(run_training, run_settings(at, tmp_path / at.name))[0] for at in (text, moved))
    assert losses(here) == losses(there)
    assert here[2]["eval/loss@0.50"] == there[2]["eval/loss@0.50"]


def last_to_meet(folder: Path) -> bool:
    """Whether all have come when `wait_for_all` returns, twice."""
    import torch.distributed as dist

    from skv_dist.parallel.processes.rendezvous import wait_for_all

    everybody_there = []
    with built(config()):
        for meeting in range(2):
            if dist.get_rank() == meeting:
                time.sleep(0.2)
            (folder / f"{meeting}-{dist.get_rank()}").touch()
            wait_for_all()
            everybody_there.append(len(list(folder.glob(f"{meeting}-*"))) == dist.get_world_size())
    return all(everybody_there)


def test_all_are_waited_for(workers: Any, tmp_path: Path) -> None:
    assert workers(2)(last_to_meet, tmp_path) == [True, True]
