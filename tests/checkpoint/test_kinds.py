"""Folders that are no checkpoints: what is said of them, and which checkpoint is meant."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.kinds import checkpoint_at, refuse_other_kinds
from skv_dist.errors import UserError


def _checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    files.write_state(folder, {"step": 1})
    files.seal(folder, files.digests(folder))
    return folder


def _json(file: Path, **fields: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(fields))


def test_of_a_run_the_newest_is_meant(tmp_path: Path) -> None:
    run = tmp_path / "run"
    old, new = (_checkpoint(files.folder_of(run / "checkpoints", step)) for step in (8, 12))
    assert checkpoint_at(run) == checkpoint_at(run / "checkpoints") == new
    assert checkpoint_at(old) == old
    with pytest.raises(UserError, match=r"step_00000009 does not exist; .* holds step_00000012, step_00000008"):
        checkpoint_at(files.folder_of(run / "checkpoints", 9))
    with pytest.raises(UserError, match=r"it is the folder of a run; name one of them, such as the newest, .*12"):
        refuse_other_kinds(run)


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a run without one": (lambda folder: (folder / "checkpoints").mkdir(), "a run that has not written one yet"),
    "Hugging Face": (lambda folder: _json(folder / "config.json", model_type="llama"), "skv-convert from-hf"),
    "exported": (lambda folder: _json(folder / "config.json", model_type="skv"), "the checkpoint that it was exported"),
    "ONNX": (lambda folder: _json(folder / "genai_config.json"), "ONNX Runtime GenAI"),
    "prepared": (lambda folder: [(folder / name).touch() for name in ("meta.json", "tokens.bin")], "data.sources"),
    "tokenizer": (lambda folder: _json(folder / "tokenizer.json"), "data.tokenizer"),
    "empty": (lambda folder: None, "it is empty"),
    "anything": (lambda folder: (folder / "a.txt").touch(), "neither manifest.json nor state.json"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_is_and_what_to_do(tmp_path: Path, kind: str) -> None:
    make, message = KINDS[kind]
    (tmp_path / "given").mkdir()
    make(tmp_path / "given")
    for asked in (checkpoint_at, refuse_other_kinds):
        with pytest.raises(UserError) as caught:
            asked(tmp_path / "given")
        assert message in str(caught.value)
        assert "damaged" not in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        checkpoint_at(tmp_path / "file")


def test_what_is_damaged_is_still_called_so(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "step_00000001")
    (folder / files.MANIFEST).unlink()
    assert checkpoint_at(folder) == folder
    with pytest.raises(files.DamagedError, match=r"manifest\.json is missing"):
        files.read_manifest(folder)


@pytest.mark.parametrize("name", ["../state.json", "/etc/passwd", "a/../../b", "a//b", "./a", ""])
def test_a_manifest_names_what_lies_within(tmp_path: Path, name: str) -> None:
    folder = _checkpoint(tmp_path / "step_00000001")
    content = json.loads((folder / files.MANIFEST).read_text())
    (folder / files.MANIFEST).write_text(json.dumps({**content, name: content["state.json"]}))
    with pytest.raises(files.DamagedError):
        files.read_manifest(folder)
    (folder / files.MANIFEST).write_text(json.dumps({**content, "tokenizer/a.json": content["state.json"]}))
    assert "tokenizer/a.json" in files.read_manifest(folder)
