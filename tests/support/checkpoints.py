"""Runs that leave checkpoints, and whether two checkpoints are the same."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import read_tensors, tensor_shapes
from tests.support.jobs.loop import run_training
from tests.support.layouts import Layout
from tests.support.settings import run_settings

HALF, END = 2, 4  # steps: of the checkpoint that runs resume from, and of all
LAYERS = 4  # one on each of four stages


def assert_equal(one: Path, other: Path) -> None:
    """Every weight and moment, bit by bit."""
    ours, theirs = (read_tensors(folder, list(tensor_shapes(folder))) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def small_run(text: Path, out: Path, layout: Layout, **sections: Any) -> dict[str, Any]:
    """Settings of a run with checkpoints at `HALF` and `END`."""
    return run_settings(
        text,
        out,
        parallel=layout.parallel,
        **{
            **sections,
            "model": {"num_layers": LAYERS, **sections.get("model", {})},
            "train": {"steps": END, **sections.get("train", {})},
            "eval": {"every": HALF, **sections.get("eval", {})},
            "checkpoint": {"every": HALF, "keep_last": None, **sections.get("checkpoint", {})},
        },
    )


def whole_run(
    workers: Any, text: Path, out: Path, layout: Layout, job: Callable[..., Any] = run_training, **sections: Any
) -> list[dict[str, Any]]:
    """The lines of metrics of such a run, without how long checkpoints took."""
    lines = workers(layout.processes)(job, small_run(text, out, layout, **sections))[0]
    return [{key: value for key, value in line.items() if not key.startswith("checkpoint/")} for line in lines]


def resumed_run(
    workers: Any, text: Path, before: Path, out: Path, layout: Layout, **sections: Any
) -> list[dict[str, Any]]:
    """The second half, from the checkpoint that the run in ``before`` has left at `HALF`."""
    (out / "checkpoints").mkdir(parents=True)
    shutil.copytree(files.folder_of(before / "checkpoints", HALF), files.folder_of(out / "checkpoints", HALF))
    shutil.copy(before / "metrics.jsonl", out / "metrics.jsonl")
    return whole_run(workers, text, out, layout, **sections)


def changed(finished: Path, folder: Path, change: Callable[[Any, Path], None]) -> Path:
    """A copy whose ``.metadata`` was changed, under a manifest that fits it."""
    shutil.copytree(finished, folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata, folder)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / files.MANIFEST).unlink()
    files.seal(folder, {path.name: files.digest(path) for path in folder.iterdir()})
    files.verify(folder)
    return folder
