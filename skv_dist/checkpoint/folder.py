"""Checkpoint folders: complete or invisible, checked before they are read. Nothing here needs torch.

``checkpoints/step_00000100/`` holds DCP's ``.metadata`` and ``__RANK_N.distcp`` (tensors), ``metadata.json``
(Megatron's mark of the format), ``state.json`` (the rest of the run's state), ``config.yaml``, and ``manifest.json``:
size and SHA-256 of every other file. A folder is written under a hidden name and renamed once all of it is on disk;
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skv_dist.config.load import load_config
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.files import WRITING, replace_text, sync_folder, unfinished_path, write_synced

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
_DELETING = ".deleting"


def folder_of(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise UserError(f"{folder} is not a checkpoint: its name is not like step_00000100")
    return int(match[1])


def existing(root: Path) -> list[Path]:
    """Complete checkpoints under ``root``, newest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def clean(root: Path) -> None:
    """Remove what a killed process left half written or half deleted."""
    if root.is_dir():
        for path in root.iterdir():
            if path.name.startswith(".") and path.name.endswith((WRITING, _DELETING)):
                shutil.rmtree(path, ignore_errors=True)


def digest(file: Path) -> dict[str, Any]:
    """Entry of a file in the manifest."""
    with file.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256")
    return {"bytes": file.stat().st_size, "sha256": content.hexdigest()}


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """What a checkpoint holds beside its tensors, and the mark of the format."""
    write_synced(folder / STATE, json.dumps(state, indent=1) + "\n")
    write_synced(folder / "metadata.json", json.dumps(_MEGATRON) + "\n")


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, the last file of a checkpoint."""
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    sync_folder(folder)


def publish(folder: Path, manifest: dict[str, Any]) -> None:
    """Make the unfinished form of ``folder`` visible: manifest, rename, ``latest`` last."""
    unfinished = unfinished_path(folder)
    seal(unfinished, manifest)
    if folder.exists():  # a damaged one of the same step, passed over at resume
        _delete(folder)
    os.rename(unfinished, folder)
    sync_folder(folder.parent)
    replace_text(folder.parent / LATEST, folder.name + "\n")


def _delete(folder: Path) -> None:
    hidden = folder.with_name(f".{folder.name}{_DELETING}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)  # at once: a reader sees all of it or nothing
    shutil.rmtree(hidden, ignore_errors=True)


def prune(root: Path, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Delete all but the newest ``keep_last`` and those whose step ``keep_every`` divides; return the deleted folders.

    ``keep_last`` None keeps everything.
    """
    if keep_last is None:
        return []
    deleted = []
    for folder in existing(root)[keep_last:]:
        if keep_every is None or step_of(folder) % keep_every:
            _delete(folder)
            deleted.append(folder)
    return deleted


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


def read_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """``config.yaml``, complete: with the vocabulary that the run had.

    Raises:
        UserError: the file, or ``state.json``, cannot be read, or an override asks for another vocabulary.
    """
    run = load_config(folder / CONFIG, overrides)
    vocab_size = read_state(folder).get("vocab_size")
    if not isinstance(vocab_size, int):
        raise UserError(f"checkpoint {folder} is damaged: {STATE} does not say its vocab_size")
    if run.model.vocab_size not in (None, vocab_size):
        raise UserError(
            f"model.vocab_size {run.model.vocab_size} is not that of checkpoint {folder}, which has {vocab_size} "
            "tokens: leave model.vocab_size out"
        )
    return run.for_vocabulary(vocab_size)
