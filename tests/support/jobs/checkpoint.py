"""Checkpoints read and written by a layout, and a disk that fills up."""

from typing import Any

from tests.support.engine import built, made_engine


def read_and_write(settings: dict[str, Any], source: str, target: str) -> None:
    """Load a checkpoint into this layout and write it again at once, as step 1."""
    from pathlib import Path

    from skv_dist.checkpoint.load import load_checkpoint
    from skv_dist.checkpoint.save import Saver

    with built(settings) as (run, world), made_engine(run, world) as engine:
        load_checkpoint(engine, run, Path(source), weights_only=False)
        saver = Saver(engine, run, Path(target))
        saver.save(1, {})
        saver.close()


def read_frozen(settings: dict[str, Any], source: str) -> None:
    """Load the weights alone, as `skv-eval` does."""
    from pathlib import Path

    from skv_dist.checkpoint.frozen_model import frozen_model

    with built(settings) as (run, world):
        frozen_model(run, Path(source), world)


def run_and_report(settings: dict[str, Any], failing: list[int]) -> tuple[str, str | None]:
    """(what was printed, the error that ended the run); saves of the steps in ``failing`` meet a full disk.

    The error comes as DCP reports it, which is no Exception.
    """
    import contextlib
    import errno
    import io
    import traceback
    from unittest import mock

    from torch.distributed.checkpoint.api import CheckpointException

    from skv_dist.checkpoint import save
    from skv_dist.commands.train import train
    from skv_dist.config.run import RunConfig
    from skv_dist.errors import UserError
    from skv_dist.parallel.processes import groups

    right = save.write_tensors

    def wrong(folder: Any, *rest: Any) -> None:
        right(folder, *rest)
        if int(folder.name.removeprefix("step_")) in failing:
            full = OSError(errno.ENOSPC, "No space left on device")
            raise CheckpointException("write", {0: (full, traceback.StackSummary())})

    printed = io.StringIO()
    with mock.patch.object(save, "write_tensors", wrong), contextlib.redirect_stdout(printed):
        try:
            train(RunConfig.model_validate(settings))
        except UserError as error:
            return printed.getvalue(), str(error)
        finally:
            groups.leave_model_parallel()
    return printed.getvalue(), None


def run_where_metrics_do_not_fit(settings: dict[str, Any], step: int) -> tuple[str, str | None]:
    """As `run_and_report`; from ``step`` on the disk has room for ten more bytes of metrics.jsonl."""
    import errno
    from unittest import mock

    from skv_dist.training.callbacks import JsonLines

    right = JsonLines.on_start

    class Full:
        def __init__(self, file: Any) -> None:
            self._file, self.fileno, self.close, self._lines = file, file.fileno, file.close, 0

        def write(self, content: bytes) -> int:
            self._lines += 1
            if self._lines >= step:
                self._file.write(content[:10])
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self._file.write(content))

    def on_start(self: Any, *arguments: Any) -> None:
        right(self, *arguments)
        self._file = Full(self._file)

    with mock.patch.object(JsonLines, "on_start", on_start):
        return run_and_report(settings, [])


def run_that_fails_while_saving(settings: dict[str, Any]) -> tuple[str, str | None]:
    """As `run_and_report`; the data end with an error at once while a checkpoint is being written, slowly."""
    import time
    from unittest import mock

    from skv_dist.checkpoint import save
    from skv_dist.errors import UserError
    from skv_dist.training.callbacks import Checkpoints

    right_write, right_step = save.write_tensors, Checkpoints.on_step

    def slow(*arguments: Any) -> None:
        time.sleep(0.5)
        right_write(*arguments)

    def on_step(self: Any, *arguments: Any) -> None:
        right_step(self, *arguments)
        raise UserError("the data are broken")

    with mock.patch.object(save, "write_tensors", slow), mock.patch.object(Checkpoints, "on_step", on_step):
        return run_and_report(settings, [])


def run_where_files_cannot_be_read(settings: dict[str, Any]) -> tuple[str, str | None]:
    """As `run_and_report`; reading a file of a checkpoint ends with an error of the file system."""
    import errno
    from unittest import mock

    from skv_dist.checkpoint import folder

    def wrong(_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with mock.patch.object(folder, "digest", wrong):
        return run_and_report(settings, [])


def run_at_home(settings: dict[str, Any], home: str) -> str | None:
    """The error that ended the run, where ``home`` is the home folder."""
    import os
    from unittest import mock

    with mock.patch.dict(os.environ, HOME=home):
        return run_and_report(settings, [])[1]
