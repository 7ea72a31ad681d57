"""Checkpoint folders: complete or invisible, checked before they are read. Pure Python.

``checkpoints/step_00000100/`` holds DCP's ``.metadata`` and ``__RANK_N.distcp`` (tensors), ``metadata.json``
(Megatron's mark of the format), ``state.json`` (the rest of the run's state), ``config.yaml``, and ``manifest.json``:
size and SHA-256 of every other file. A folder is written aside and renamed once all of it is on disk;
``checkpoints/latest`` names the newest.

Trust: whoever can write a checkpoint can choose what a run computes, but not what it executes. The manifest finds
damage, not forgery. Tensors are read with ``weights_only``, the one pickle that the format has (``.metadata``) with an
unpickler that knows its classes only.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skv_dist.errors import UserError

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.yaml"
LATEST = "latest"
# What megatron.core.dist_checkpointing looks for in a folder of this format.
_MEGATRON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_NAME = re.compile(r"step_(\d{8})")
_ASIDE, _DELETED = ".writing", ".deleting"


def folder_of(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def aside_of(folder: Path) -> Path:
    """Where ``folder`` is written before it appears."""
    return folder.with_name(f".{folder.name}{_ASIDE}")


def step_of(folder: Path) -> int:
    found = _NAME.fullmatch(folder.name)
    if found is None:
        raise UserError(f"{folder} is not a checkpoint: its name is not like step_00000100")
    return int(found[1])


def existing(root: Path) -> list[Path]:
    """Complete checkpoints under ``root``, newest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def clean(root: Path) -> None:
    """Remove what a killed process left half written or half deleted."""
    if root.is_dir():
        for path in root.iterdir():
            if path.name.startswith(".") and path.name.endswith((_ASIDE, _DELETED)):
                shutil.rmtree(path, ignore_errors=True)


def digest(file: Path) -> dict[str, Any]:
    """Entry of a file in the manifest."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256")
    return {"bytes": file.stat().st_size, "sha256": found.hexdigest()}


def write_synced(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """What a checkpoint holds beside its tensors, and the mark of the format."""
    write_synced(folder / STATE, json.dumps(state, indent=1) + "\n")
    write_synced(folder / "metadata.json", json.dumps(_MEGATRON) + "\n")


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, the last file of a checkpoint."""
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    _sync_folder(folder)


def publish(folder: Path, manifest: dict[str, Any]) -> None:
    """Make what lies aside for ``folder`` visible: manifest, rename, ``latest`` last."""
    aside = aside_of(folder)
    seal(aside, manifest)
    if folder.exists():  # a damaged one of the same step, passed over at resume
        _delete(folder)
    os.rename(aside, folder)
    _sync_folder(folder.parent)
    pointer = folder.parent / f".{LATEST}{_ASIDE}"
    write_synced(pointer, folder.name + "\n")
    os.replace(pointer, folder.parent / LATEST)
    _sync_folder(folder.parent)


def _delete(folder: Path) -> None:
    hidden = folder.with_name(f".{folder.name}{_DELETED}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)  # at once: a reader sees all of it or nothing
    shutil.rmtree(hidden, ignore_errors=True)


def prune(root: Path, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Delete all but the newest ``keep_last`` and those whose step ``keep_every`` divides; what was deleted.

    ``keep_last`` None keeps everything.
    """
    if keep_last is None:
        return []
    gone = []
    for folder in existing(root)[keep_last:]:
        if keep_every is None or step_of(folder) % keep_every:
            _delete(folder)
            gone.append(folder)
    return gone


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UserError where ``folder`` is no complete checkpoint."""
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} does not exist")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not all(isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in manifest.values()):
            raise ValueError
    except OSError as error:
        raise UserError(f"checkpoint {folder} is damaged: {MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {MANIFEST} is not what was written") from error
    return dict(manifest)


def verify(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Check this share of the files against the manifest.

    Raises:
        UserError: naming the first file that is missing, cut short, changed, or not of this checkpoint.
    """
    manifest = read_manifest(folder)
    extra = sorted({path.name for path in folder.iterdir()} - set(manifest) - {MANIFEST})
    if extra:
        raise UserError(f"checkpoint {folder} is damaged: it holds {extra[0]}, which its manifest does not know")
    for name in sorted(manifest)[share::shares]:
        file, entry = folder / name, manifest[name]
        if not file.is_file():
            raise UserError(f"checkpoint {folder} is damaged: {name} is missing")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise UserError(f"checkpoint {folder} is damaged: {name} has {size} bytes instead of {entry['bytes']}")
        if digest(file) != entry:
            raise UserError(f"checkpoint {folder} is damaged: the content of {name} has changed")


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json``. Raises UserError where it cannot be read."""
    try:
        return dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {STATE} cannot be read") from error


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
    _replace(file, kept)


def _replace(file: Path, lines: Iterable[str]) -> None:
    aside = file.with_name(f".{file.name}{_ASIDE}")
    write_synced(aside, "".join(f"{line}\n" for line in lines))
    os.replace(aside, file)
