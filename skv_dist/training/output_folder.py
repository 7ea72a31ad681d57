"""``train.output_dir``: ``config.yaml``, ``metrics.jsonl`` with one JSON object a step, and what other parts add."""

import json
from pathlib import Path

from skv_dist.config.load import dump_config
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.files import replace_text

CONFIG, METRICS, CHECKPOINTS, TENSORBOARD = "config.yaml", "metrics.jsonl", "checkpoints", "tensorboard"


def claim(folder: Path, resume: str) -> None:
    """Make the run's folder; refuse to write over an earlier run unless this one goes on from it.

    Raises:
        UserError: ``folder`` holds a run, or cannot be written to.
    """
    if resume == "never" and (folder / METRICS).exists():
        raise UserError(
            f"train.output_dir {folder} already holds a run and checkpoint.resume is 'never': choose another folder, "
            "move that one away or set checkpoint.resume=auto"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METRICS).touch()
    except OSError as error:
        raise UserError(f"train.output_dir {folder} cannot be written: {error.strerror}") from error


def begin(folder: Path, run: RunConfig, step: int) -> None:
    """Note the resolved configuration, and forget what an earlier part of the run recorded after ``step``."""
    (folder / CONFIG).write_text(dump_config(run), encoding="utf-8")
    truncate_metrics(folder / METRICS, step)


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
