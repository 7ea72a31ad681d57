"""Whole runs inside workers, and the training loop."""

import contextlib
from typing import Any

import numpy as np

from tests.support.batches import global_batch
from tests.support.engine import built, drawn_plans, made_engine
from tests.support.settings import SEQUENCE


def run_training(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """`skv-train` without the command line; the lines of metrics.jsonl."""
    from pathlib import Path

    from skv_dist.commands.train import train
    from skv_dist.config.run import RunConfig
    from skv_dist.parallel.processes import groups
    from tests.support.runs import lines_of

    try:
        train(RunConfig.model_validate(settings))
        return lines_of(Path(settings["train"]["output_dir"]))
    finally:
        groups.leave_model_parallel()


def run_and_print(settings: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """As `run_training`, with what was printed."""
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        return run_training(settings), printed.getvalue()


def run_with_sources_shifted(settings: dict[str, Any], num_sources: int) -> list[dict[str, Any]]:
    """As `run_training`, where each sample is said to come from the source behind its own."""
    from unittest import mock

    from skv_dist.data import batches

    right = batches.collate

    def wrong(index: int, samples: Any, *rest: Any) -> Any:
        shifted = [sample._replace(source=(sample.source + 1) % num_sources) for sample in samples]
        return right(index, shifted, *rest)

    with mock.patch.object(batches, "collate", wrong):
        return run_training(settings)


def _trainer(run: Any, world: Any, engine: Any, samples: Any) -> Any:
    from skv_dist.config.run import derive
    from skv_dist.training.trainer import Trainer

    return Trainer(run, derive(run, world.size), world, engine, samples)


def steps_before_data_fail(settings: dict[str, Any], position: int) -> list[int]:
    """The steps that callbacks hear of where sample ``position`` cannot be read."""
    from skv_dist.data.packing import Sample
    from skv_dist.errors import UserError
    from skv_dist.training.callbacks import Callback, Metrics

    class Broken:
        def __getitem__(self, index: int) -> Sample:
            if index >= position:
                raise UserError(f"sample {index} is broken")
            return Sample(np.arange(SEQUENCE + 1), np.zeros(SEQUENCE + 1, np.int64))

    heard: list[int] = []

    class Listener(Callback):
        def on_step(self, step: int, metrics: Metrics) -> None:
            heard.append(step)

    with built(settings) as (run, world), made_engine(run, world) as engine:
        trainer = _trainer(run, world, engine, Broken())
        with contextlib.suppress(UserError):
            trainer.fit([Listener()])
    return heard


def host_reads(settings: dict[str, Any]) -> int:
    """How often the host reads a tensor's value while it launches a step: on a GPU each is a wait.

    Compiled functions run as they are written.
    """
    from unittest import mock

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from skv_dist.model.cross_entropy import compiled_once

    class Count(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def unchanged(function: Any = None, **_: Any) -> Any:
        return function or unchanged

    with (
        mock.patch("torch.compile", unchanged),
        mock.patch.object(torch.nn.Module, "compile", unchanged),
        # Neither what this process has compiled before is used here, nor what is not compiled here by later jobs.
        mock.patch("skv_dist.model.cross_entropy.compiled_once", compiled_once.__wrapped__),
        mock.patch("skv_dist.model.distillation.compiled_once", compiled_once.__wrapped__),
        built(settings) as (run, world),
        made_engine(run, world) as engine,
    ):
        trainer = _trainer(run, world, engine, [])
        trainer._sources = ["one", "other"]
        batches = global_batch(0)
        work = list(zip(batches, drawn_plans(run, batches, 0)))
        with Count() as count:
            trainer.launch(work)
    return count.reads


def steps_until_sigterm_within(settings: dict[str, Any], step: int) -> tuple[int, str | None]:
    """SIGTERM arrives while ``step`` is computed: (steps that were made, what stopped the run)."""
    import os
    import signal
    import time
    from unittest import mock

    from skv_dist.training import trainer as training
    from skv_dist.training.stop import StopRequest

    right, calls, stop = training.run_batch, 0, StopRequest()

    def interrupted(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGTERM)
            while not stop.weight:  # a thread takes it
                time.sleep(0.01)
        return right(*args, **keywords)

    class Samples:
        def __getitem__(self, index: int) -> Any:
            from skv_dist.data.packing import Sample

            return Sample(np.arange(SEQUENCE + 1), np.zeros(SEQUENCE + 1, np.int64))

    with built(settings) as (run, world), made_engine(run, world) as engine:
        trainer = _trainer(run, world, engine, Samples())
        with mock.patch.object(training, "run_batch", interrupted), stop:
            trainer.fit(stop=stop)
        return trainer.step, trainer.stopped_by and trainer.stopped_by.name
