"""Damaged checkpoints: refused in one line, or read as they were."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from skv_tools.checkpoint.cli import main as checkpoint_main
from skv_tools.convert.cli import main as convert_main

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import read_tensors, tensor_shapes
from tests.fuzz.bounds import Caller, examples
from tests.fuzz.conftest import fresh
from tests.fuzz.damage import Damage, choices, damage_one, damages
from tests.security.crafted import sealed
from tests.support.jobs.commands import outcome_of

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> Tensors:
    return {f"model.{name}": value for name, value in _named(checkpoint).items()}


def _named(checkpoint: Path) -> Tensors:
    found = read_tensors(checkpoint, list(tensor_shapes(checkpoint)))
    return {name.removeprefix("model."): value for name, value in found.items()}


def _damaged(checkpoint: Path, work: Path, choice: float, damage: Damage, is_sealed: bool) -> tuple[Path, str | None]:
    folder = fresh(work) / checkpoint.name
    shutil.copytree(checkpoint, folder)
    name = damage_one(folder, choice, damage)
    if is_sealed and name != files.MANIFEST:
        sealed(folder)
    return folder, name


@examples(40)
@given(choice=choices, damage=damages, is_sealed=st.booleans())
def test_damage(
    caller: Caller, checkpoint: Path, weights: Tensors, work: Path, choice: float, damage: Damage, is_sealed: bool
) -> None:
    """``is_sealed``: the manifest fits the damage, as if it had happened before it was written."""
    folder, name = _damaged(checkpoint, work, choice, damage, is_sealed)
    listed = caller.refused_or_right(checkpoint_main, "inspect", folder, "--tensors", names=[folder])
    written = caller.refused_or_right(checkpoint_main, "export", folder, work / "out", names=[folder])
    made = caller.refused_or_right(convert_main, "to-hf", folder, work / "hf", "--full", "--no-verify")
    assert (work / "out").exists() == (written is not None)
    assert (work / "hf").exists() == (made is not None)
    if name is None:
        assert None not in (listed, written, made)
    if not is_sealed and name not in (None, files.MANIFEST):
        assert (listed, written, made) == (None, None, None)  # the sums say so
    if written is not None and not (is_sealed and str(name).endswith(".distcp")):
        got = load_file(work / "out" / "model.safetensors")
        assert got.keys() == {key.removeprefix("model.") for key in weights}
        assert all(torch.equal(value, weights[f"model.{key}"]) for key, value in got.items())
    if made is not None:
        json.loads((work / "hf" / "config.json").read_text())


@examples(6)
@given(choice=choices, damage=damages, is_sealed=st.booleans())
def test_an_engine_is_loaded_or_refuses(
    workers: Any, checkpoint: Path, work: Path, choice: float, damage: Damage, is_sealed: bool
) -> None:
    folder, name = _damaged(checkpoint, work, choice, damage, is_sealed)
    arguments = [str(folder), "--retention", "1.0", "--prompt", "w3 w4", "--new-tokens", "2", "--samples", "4"]
    overrides = [f"data.sources.0.path={work / 'text'}", "data.sequence_length=4", "data.validation_split=sequence"]
    (work / "text").write_text("w3 w4 w5 w6 " * 200)
    ((end, said),) = workers(1)(outcome_of, "skv_dist.commands.evaluate", [*arguments, *overrides])
    assert end == "refused" or said == "0"
    assert end == "refused" or is_sealed or name in (None, files.MANIFEST)
