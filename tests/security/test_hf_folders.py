"""Hugging Face folders and exported folders of somebody else."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from skv_tools.convert import run_engine
from skv_tools.convert.cli import main

from tests.security.crafted import Touch
from tests.support.processes import run_forked
from tests.tools.convert.hf_models import make, save


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Path]:
    yield (file := tmp_path / "executed")
    assert not file.exists()


@pytest.fixture(scope="module")
def stock(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(make("llama", layers=2), tmp_path_factory.mktemp("stock") / "hf")
    shutil.copytree(words, folder, dirs_exist_ok=True)
    return folder


def convert(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code, and what it said to stderr."""
    capsys.readouterr()
    before, sys.argv = sys.argv, ["skv-convert", *map(str, arguments)]
    try:
        code = main()
    finally:
        sys.argv = before
    return code, capsys.readouterr().err


def copied(folder: Path, to: Path, made: Path, **fields: object) -> Path:
    """A copy with code beside the weights and other fields of ``config.json``."""
    shutil.copytree(folder, to)
    (to / "evil.py").write_text(f"open({str(made)!r}, 'w')\n")
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **fields}))
    return to


EVIL = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoModel": "evil.Evil"}


def test_from_hf_runs_no_code(
    stock: Path, tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither here nor in transformers, which the result is compared with; the weights are those of the folder."""
    monkeypatch.setattr(run_engine.subprocess, "run", run_forked)
    source = copied(stock, tmp_path / "hf", made, auto_map=EVIL, model_file="evil.py")
    torch.save(Touch(made), source / "pytorch_model.bin")
    assert convert(capsys, "from-hf", source, tmp_path / "ours")[0] == 0
    assert (tmp_path / "ours" / "manifest.json").exists()


def test_from_hf_reads_no_pickles(stock: Path, tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copied(stock, tmp_path / "hf", made)
    (source / "model.safetensors").unlink()
    torch.save(Touch(made), source / "pytorch_model.bin")
    assert convert(capsys, "from-hf", source, tmp_path / "ours") == (
        2,
        f"skv-convert: error: {source} holds neither model.safetensors nor model.safetensors.index.json: only "
        "safetensors are read\n",
    )
    (source / "model.safetensors").write_bytes(pickle.dumps(Touch(made)))
    code, said = convert(capsys, "from-hf", source, tmp_path / "ours")
    assert (code, said.count("\n")) == (2, 1)
    assert "model.safetensors" in said


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/tmp/outside.safetensors", "..", "", ".", "a/../b", 3, None]
)
def test_an_index_names_files_beside_it_only(
    stock: Path, tmp_path: Path, made: Path, place: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copied(stock, tmp_path / "hf", made)
    os.rename(source / "model.safetensors", tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))
    code, said = convert(capsys, "from-hf", source, tmp_path / "ours")
    assert (code, said.count("\n")) == (2, 1), said
    assert "which is no file beside it" in said
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"auto_map": {"AutoConfig": "modeling_skv.SkvConfig", "AutoModelForCausalLM": "evil.Evil"}}, "auto_map"),
        ({"auto_map": {"AutoConfig": "owner/name--modeling_skv.SkvConfig"}}, "auto_map"),
        ({"auto_map": {"AutoImageProcessor": "evil.Evil"}}, "auto_map"),
        ({"model_file": "evil.py"}, "model_file"),
        ({"model_type": "llama", "auto_map": EVIL}, "auto_map"),
        ({"model_type": "llama", "auto_map": None, "model_file": "evil.py"}, "auto_map"),
    ],
)
def test_an_engine_is_started_on_our_code_only(
    whole: Path,
    exported: Path,
    tmp_path: Path,
    made: Path,
    fields: dict[str, object],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """vLLM and MLX are told to run the code that ``config.json`` names: it must be the installed one."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(run_engine.subprocess, "run", started)
    folder = copied(exported, tmp_path / "exported", made, **fields)
    for engine in ("transformers", "vllm", "mlx"):
        code, said = convert(capsys, "verify", whole, folder, "--engine", engine)
        assert (code, said.count("\n")) == (2, 1), said
        assert f"config.json: {named}" in said


def test_changed_code_is_refused(
    whole: Path, exported: Path, tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(exported, tmp_path / "exported", made)
    with (folder / "modeling_skv.py").open("a") as file:
        file.write(f"open({str(made)!r}, 'w')\n")
    code, said = convert(capsys, "verify", whole, folder)
    assert (code, said.count("\n")) == (2, 1)
    assert "modeling_skv.py is not the file of this version" in said
