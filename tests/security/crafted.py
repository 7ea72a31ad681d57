"""Checkpoints made to do harm, each under a manifest that fits it."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from skv_dist.checkpoint import folder as files

NAME = "model.final_norm.weight"
_DATA = "__0_0.distcp"


class Touch:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._file}",)


def sealed(folder: Path) -> None:
    """Give ``folder`` a manifest that says what is in it now."""
    (folder / files.MANIFEST).unlink()
    files.seal(folder, files.digests(folder))
    files.verify(folder)


def _metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def _appended(folder: Path, content: object) -> _StorageInfo:
    with (folder / _DATA).open("ab") as stream:
        begin = stream.tell()
        torch.save(content, stream)
        return _StorageInfo(_DATA, begin, stream.tell() - begin)


def metadata_is_a_command(folder: Path, made: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(made)))


def metadata_holds_a_command(folder: Path, made: Path) -> None:
    metadata = _metadata(folder)
    metadata.planner_data = Touch(made)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def a_tensor_is_called_bytes(folder: Path, made: Path) -> None:
    metadata, place = _metadata(folder), _appended(folder, Touch(made))
    metadata.state_dict_metadata[NAME] = BytesStorageMetadata()
    metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn != NAME}
    metadata.storage_data[MetadataIndex(NAME)] = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def a_tensor_is_a_command(folder: Path, made: Path) -> None:
    metadata, place = _metadata(folder), _appended(folder, Touch(made))
    for index in metadata.storage_data:
        if index.fqn == NAME:
            metadata.storage_data[index] = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def the_configuration_is_a_command(folder: Path, made: Path) -> None:
    config = (folder / files.CONFIG).read_text()
    (folder / files.CONFIG).write_text(f"{config}base: !!python/object/apply:os.system ['touch {made}']\n")


def the_configuration_names_another_file(folder: Path, made: Path) -> None:
    """``base`` would have any file of the machine read as YAML, and its lines told."""
    config = (folder / files.CONFIG).read_text()
    (folder / files.CONFIG).write_text(f"base: /etc/hostname\n{config}")


def a_template_is_to_be_written_elsewhere(folder: Path, made: Path) -> None:
    file = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    (folder / "tokenizer" / "chat_template.jinja").unlink(missing_ok=True)
    templates = {"default": "{{ messages }}", str(made.with_suffix("")): "x"}
    settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    file.write_text(json.dumps(settings))


def a_file_is_a_pipe(folder: Path, made: Path) -> None:
    """Who opens it waits for ever."""
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")


def the_manifest_names_a_file_elsewhere(folder: Path, made: Path) -> None:
    outside = folder.parent / "outside"
    outside.write_text("x")
    manifest = json.loads((folder / files.MANIFEST).read_text())
    manifest["../outside"] = files.digest(outside)
    (folder / files.MANIFEST).write_text(json.dumps(manifest))


def the_manifest_holds_a_second_line(folder: Path, made: Path) -> None:
    """Which an error would print as if it were ours."""
    manifest = json.loads((folder / files.MANIFEST).read_text())
    manifest["a\nskv-train: all is well\x1b[2J"] = {"bytes": 1, "sha256": "0"}
    (folder / files.MANIFEST).write_text(json.dumps(manifest))


Craft = Callable[[Path, Path], None]
# With a part of the line that refuses it.
CRAFTS: dict[Craft, str] = {
    metadata_is_a_command: "posix.system, which is not part of the format",
    metadata_holds_a_command: "posix.system, which is not part of the format",
    a_tensor_is_called_bytes: f"calls '{NAME}' bytes",
    a_tensor_is_a_command: "called a tensor is none",
    the_configuration_is_a_command: "not valid YAML",
    the_configuration_names_another_file: "'base'",
    a_template_is_to_be_written_elsewhere: "has a chat template called",
    a_file_is_a_pipe: "state.json is no plain file",
    the_manifest_names_a_file_elsewhere: "manifest.json is not what was written",
    the_manifest_holds_a_second_line: "is missing",
}
_SEALS = {the_manifest_names_a_file_elsewhere, the_manifest_holds_a_second_line, a_file_is_a_pipe}


def crafted(whole: Path, folder: Path, craft: Craft, made: Path) -> Path:
    """A copy of a checkpoint, changed."""
    shutil.copytree(whole, folder)
    craft(folder, made)
    if craft not in _SEALS:
        sealed(folder)
    return folder
