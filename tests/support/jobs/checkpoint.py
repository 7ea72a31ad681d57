"""Checkpoints read and written by a layout, and a disk that fills up."""

from typing import Any

from tests.support.engine import built, made_engine
from tests.support.jobs.loop import run_and_print


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


def run_on_a_full_disk(settings: dict[str, Any], step: int) -> tuple[list[dict[str, Any]], str]:
    """As `run_and_print`; writing the checkpoint of ``step`` fails once its tensors are on disk."""
    import errno
    from unittest import mock

    from skv_dist.checkpoint import save

    right = save.write_tensors

    def wrong(folder: Any, *rest: Any) -> None:
        right(folder, *rest)
        if folder.name.endswith(f"{step:08d}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(save, "write_tensors", wrong):
        return run_and_print(settings)


def read_frozen(settings: dict[str, Any], source: str) -> None:
    """Load the weights alone, as `skv-eval` does."""
    from pathlib import Path

    from skv_dist.checkpoint.frozen_model import frozen_model

    with built(settings) as (run, world):
        frozen_model(run, Path(source), world)
