"""``train.output_dir``: ``config.yaml``, ``metrics.jsonl`` with one JSON object a step, and what other parts add."""

import json
from pathlib import Path

from skv_dist.checkpoint.folder import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    clean,
    existing,
    read_state,
    set_best,
    supersede,
)
from skv_dist.config.load import dump_config
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.files import replace_text


def folder_of(run: RunConfig) -> Path:
    """``train.output_dir``, with ``~`` expanded."""
    return Path(run.train.output_dir).expanduser()


def claim(folder: Path, resume: str) -> None:
    """Make the run's folder; refuse to write over an earlier run unless this one goes on from it.

    Raises:
        UserError: ``folder`` holds a run, or cannot be written to.
    """
    if resume == "never" and ((folder / METRICS).exists() or existing(folder / CHECKPOINTS)):
        raise UserError(
            f"train.output_dir {folder} already holds a run and checkpoint.resume is 'never': choose another folder, "
            "move that one away or set checkpoint.resume=auto"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train.output_dir {folder} cannot be written: {error.strerror}") from error


def begin(folder: Path, run: RunConfig, step: int, start: Path | None) -> None:
    """Note the resolved configuration, and set apart what an earlier part of the run left after ``step``.

    Args:
        start: the checkpoint that the run goes on from. Others that do not lead to it go to ``superseded``, with a copy
            of the metrics.

    Raises:
        UserError: the folder cannot be written.
    """
    checkpoints = folder / CHECKPOINTS
    clean(checkpoints)
    moved = supersede(checkpoints, start, folder / METRICS)
    if moved:
        print(f"moved to {moved[0].parent}: {', '.join(path.name for path in reversed(moved))}", flush=True)
    try:
        set_best(checkpoints, None if start is None else (read_state(start).get("best") or {}).get("step"))
        replace_text(folder / CONFIG, dump_config(run))
        truncate_metrics(folder / METRICS, -1 if start is None else step)  # step 0 is measured again
        (folder / METRICS).touch()
    except OSError as error:
        raise UserError(f"train.output_dir {folder} cannot be written: {error.strerror}") from error


def truncate_metrics(file: Path, step: int) -> None:
    """Drop the lines of steps after ``step``, and a last line that was cut off."""
    if not file.exists():
        return
    kept: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    replace_text(file, "".join(f"{line}\n" for line in kept))
