"""Damaged folders of Hugging Face's form: refused in one line, or read rightly."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skv_tools.convert import verify
from skv_tools.convert.cli import main

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import read_tensors, tensor_shapes
from skv_dist.errors import UserError
from tests.fuzz.bounds import Caller, examples
from tests.fuzz.conftest import fresh
from tests.fuzz.damage import Damage, choices, damage_one, damages, files_of

Tensors = dict[str, torch.Tensor]


def _read(checkpoint: Path) -> Tensors:
    return read_tensors(checkpoint, list(tensor_shapes(checkpoint)))


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> Tensors:
    return _read(checkpoint)


@examples(25)
@given(choice=choices, damage=damages)
def test_from_hf(caller: Caller, stock: Path, weights: Tensors, work: Path, choice: float, damage: Damage) -> None:
    source = fresh(work) / "hf"
    shutil.copytree(stock, source)
    name = damage_one(source, choice, damage)
    made = caller.refused_or_right(main, "from-hf", source, work / "ours", "--no-verify")
    assert (work / "ours").exists() == (made is not None)
    assert not list(work.glob(".*"))  # nothing half written
    if made is None:
        assert name is not None
        return
    files.verify(work / "ours")
    got = _read(work / "ours")
    assert got.keys() == weights.keys()
    if not str(name).endswith(".safetensors"):  # which has no sums: a changed value is read as it is (docs/security.md)
        assert all(torch.equal(got[key], value) for key, value in weights.items())


def _change_field(folder: Path, choice: float, value: object, removed: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    field = sorted(config)[int(choice * len(config))]
    config[field] = value
    if removed:
        del config[field]
    (folder / "config.json").write_text(json.dumps(config))


def _check_exported(caller: Caller, checkpoint: Path, folder: Path, out: Path) -> None:
    """Up to where an engine would be started, which takes long."""
    engine = mock.Mock(side_effect=UserError("no engine is started here"))
    with mock.patch.object(verify, "run_engine", engine):
        assert caller.refused_or_right(main, "verify", checkpoint, folder) is None
    made = caller.refused_or_right(main, "to-onnx", folder, out, "--no-verify")
    assert out.exists() == (made is not None)


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, 10**400, -(2**63)]),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta", "a"]), st.none() | st.integers(0, 9)),
)


@examples(25)
@given(choice=choices, value=_VALUES, removed=st.booleans())
def test_fields_of_config(caller: Caller, stock: Path, work: Path, choice: float, value: object, removed: bool) -> None:
    source = fresh(work) / "hf"
    shutil.copytree(stock, source)
    _change_field(source, choice, value, removed)
    made = caller.refused_or_right(main, "from-hf", source, work / "ours", "--no-verify")
    assert (work / "ours").exists() == (made is not None)


@examples(25)
@given(choice=choices, damage=damages, is_config=st.booleans())
def test_exported(
    caller: Caller, checkpoint: Path, exported: Path, work: Path, choice: float, damage: Damage, is_config: bool
) -> None:
    """Up to where an engine would be started, which takes long."""
    folder = fresh(work) / "exported"
    shutil.copytree(exported, folder)
    damage_one(folder, choice, damage, ["config.json"] if is_config else files_of(folder))
    _check_exported(caller, checkpoint, folder, work / "onnx")


@examples(25)
@given(choice=choices, value=_VALUES, removed=st.booleans())
def test_fields_of_exported(
    caller: Caller, checkpoint: Path, exported: Path, work: Path, choice: float, value: object, removed: bool
) -> None:
    folder = fresh(work) / "exported"
    shutil.copytree(exported, folder)
    _change_field(folder, choice, value, removed)
    _check_exported(caller, checkpoint, folder, work / "onnx")
