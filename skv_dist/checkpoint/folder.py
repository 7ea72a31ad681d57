"""Checkpoint folders: complete or invisible, checked before they are read. Nothing here needs torch.

``checkpoints/step_00000100/`` holds DCP's ``.metadata`` and ``__RANK_N.distcp`` (tensors), ``metadata.json``
(Megatron's mark of the format), ``state.json`` (the rest of the run's state), ``config.yaml``, of a run that streams
``stream.json``, what
`skv_dist.checkpoint.travelling` lists, and ``manifest.json``: size and SHA-256 of every other file. A folder is written
under a hidden name and renamed once all of it is on disk; ``checkpoints/latest`` names the newest. Files that the
manifest does not know, such as ``.DS_Store``, are ignored.

The checkpoints in ``checkpoints`` are those of one line of training, so a higher step is a later one. Where a run goes
on from an earlier step, the later ones go to ``checkpoints/superseded`` first: nothing deletes them but their owner.

Trust: whoever can write a checkpoint can choose what a run computes, but not what it executes. The manifest finds
damage, not forgery; `skv_dist.checkpoint.metadata` says how tensors are read.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skv_dist.config.load import load_config
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.files import WRITING, parse_json, replace_text, sync_folder, unfinished_path, write_synced

MANIFEST = "manifest.json"
STATE = "state.json"
STREAM = "stream.json"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"  # in the folder of a run, as are the next two
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
LATEST = "latest"
BEST = "best"
SUPERSEDED = "superseded"
# What megatron.core.dist_checkpointing looks for in a folder of this format.
_MEGATRON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_NAME = re.compile(r"step_(\d{8})")
_DELETING = ".deleting"


class DamagedError(UserError):
    """The content of a checkpoint is not what was written. An error of the file system is none of these."""


def folder_of(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise UserError(f"{folder} is not a checkpoint: its name is not like step_00000100")
    return int(match[1])


def existing(root: Path) -> list[Path]:
    """Complete checkpoints under ``root``, newest first.

    Raises:
        UserError: ``root`` cannot be read, or ``latest`` says that checkpoints are missing.
    """
    try:
        names = sorted((path.name for path in root.iterdir()), reverse=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error.strerror}") from error
    complete = [root / name for name in names if _NAME.fullmatch(name)]
    if not complete and LATEST in names:
        raise UserError(
            f"{root / LATEST} names a checkpoint, but {root} holds none: bring the checkpoints back, or remove that "
            "file to start afresh"
        )
    return complete


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


def digests(folder: Path) -> dict[str, Any]:
    """Entries of all files of ``folder``, those in folders too."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest(path) for path in found}


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """What a checkpoint holds beside its tensors, and the mark of the format.

    Where the state has an entry ``stream``, it gets a file of its own.
    """
    stream = state.get("stream")
    if stream is not None:
        write_synced(folder / STREAM, json.dumps(stream) + "\n")
    state = {key: value for key, value in state.items() if key != "stream"}
    write_synced(folder / STATE, json.dumps(state, indent=1) + "\n")
    write_synced(folder / "metadata.json", json.dumps(_MEGATRON) + "\n")


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, the last file of a checkpoint."""
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    sync_folder(folder)


def publish(folder: Path, manifest: dict[str, Any]) -> None:
    """Make the unfinished form of ``folder`` visible: manifest, rename, ``latest`` last.

    Raises:
        OSError: a file cannot be written, or is not whole where this process looks for it.
    """
    unfinished = unfinished_path(folder)
    for name, entry in manifest.items():  # written by other processes, perhaps on other hosts
        file = unfinished / name
        if not file.exists() or file.stat().st_size != entry["bytes"]:
            raise OSError(errno.EIO, f"{name} is not whole where {socket.gethostname()} looks for it")
    seal(unfinished, manifest)
    latest = folder.parent / LATEST
    write_synced(unfinished_path(latest), folder.name + "\n")  # before the renames, which need no space
    if folder.exists():  # written by this run before, but reported as a failure
        _delete(folder)
    os.rename(unfinished, folder)
    os.replace(unfinished_path(latest), latest)
    sync_folder(folder.parent)


def supersede(root: Path, start: Path | None, beside: Path) -> list[Path]:
    """Move the checkpoints that do not lead to ``start`` into a new folder under ``superseded``; their new places.

    These are the later ones, and all of them where ``start`` lies elsewhere or is None. A copy of the file ``beside``
    (the metrics) goes with them.

    Raises:
        UserError: they cannot be moved.
    """
    inside = start is not None and start.resolve().parent == root.resolve()
    others = [folder for folder in existing(root) if not (inside and start and folder.name <= start.name)]
    if not others:
        return []
    try:
        parent = root / SUPERSEDED
        parent.mkdir(exist_ok=True)
        number = max((int(path.name) for path in parent.iterdir() if path.name.isdigit()), default=0) + 1
        target = parent / str(number)
        target.mkdir()
        if beside.exists():
            shutil.copyfile(beside, target / beside.name)
        for folder in others:  # the latest first: whatever interrupts this leaves one line of training
            os.rename(folder, target / folder.name)
        if inside and start:
            replace_text(root / LATEST, start.name + "\n")
        else:
            (root / LATEST).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"checkpoints in {root} cannot be moved to {SUPERSEDED}: {error.strerror}") from error
    return [target / folder.name for folder in others]


def _delete(folder: Path) -> None:
    hidden = folder.with_name(f".{folder.name}{_DELETING}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)  # at once: a reader sees all of it or nothing
    shutil.rmtree(hidden, ignore_errors=True)


def set_best(root: Path, step: int | None) -> None:
    """Have ``best`` name the checkpoint of a step, if it is there.

    Else, where that one could not be written say, ``best`` goes on naming what it does, as long as that is there.
    """
    folder = None if step is None else folder_of(root, step)
    if folder is not None and folder.is_dir():
        replace_text(root / BEST, folder.name + "\n")
    elif not followed(root / BEST).is_dir():
        (root / BEST).unlink(missing_ok=True)


def followed(path: Path) -> Path:
    """The checkpoint that the file ``latest`` or ``best`` of a run names; any other path as it is."""
    if path.name not in (LATEST, BEST) or not path.is_file():
        return path
    try:
        name = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return path
    return path.parent / name if re.fullmatch(r"step_\d+", name) else path


def prune(root: Path, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Delete all but the newest ``keep_last``, those whose step ``keep_every`` divides, and the one that ``best``
    names; return the deleted folders.

    ``keep_last`` None keeps everything.
    """
    if keep_last is None:
        return []
    deleted = []
    best = followed(root / BEST)
    for folder in existing(root)[keep_last:]:
        if folder != best and (keep_every is None or step_of(folder) % keep_every):
            with contextlib.suppress(FileNotFoundError):  # a run that goes on prunes its own
                _delete(folder)
                deleted.append(folder)
    return deleted


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UserError where ``folder`` cannot be read; DamagedError where it is no complete checkpoint.

    `skv_dist.checkpoint.kinds` says what a folder is that was never one.
    """
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} does not exist")
    _require_plain(folder, MANIFEST)
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest.items():
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str) or not _is_inside(name):
                raise ValueError
    except FileNotFoundError as error:
        raise DamagedError(f"checkpoint {folder} is damaged: {MANIFEST} is missing") from error
    except OSError as error:
        raise unreadable(folder / MANIFEST, error) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"checkpoint {folder} is damaged: {MANIFEST} is not what was written") from error
    return dict(manifest)


def require_plain(folder: Path) -> None:
    """Raises DamagedError where a file of the manifest is a pipe or a device, which would be read without end."""
    for name in (MANIFEST, *read_manifest(folder)):
        _require_plain(folder, name)


def _require_plain(folder: Path, name: str) -> None:
    """Links are followed: caches of a hub are made of them. A missing file is left to who reads it."""
    try:
        mode = (folder / name).stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        raise DamagedError(f"checkpoint {folder} is damaged: {name} is no plain file")


def _is_inside(name: str) -> bool:
    """Whether a path in a manifest stays within the checkpoint."""
    parts = name.split("/")
    return "\\" not in name and all(part not in ("", ".", "..") for part in parts)


def unreadable(file: Path, error: OSError) -> UserError:
    """For an error of the file system, which is no damage."""
    return UserError(f"{file} cannot be read: {error.strerror or error}; start again once it can")


def verify(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Check this share of the files against the manifest.

    Raises:
        DamagedError: naming the first file that is missing, cut short or changed.
        UserError: a file cannot be read.
    """
    manifest = read_manifest(folder)
    for name in sorted(manifest)[share::shares]:
        file, entry = folder / name, manifest[name]
        _require_plain(folder, name)
        try:
            size = file.stat().st_size
            if size != entry["bytes"]:
                raise DamagedError(
                    f"checkpoint {folder} is damaged: {name} has {size} bytes instead of {entry['bytes']}"
                )
            if digest(file) != entry:
                raise DamagedError(f"checkpoint {folder} is damaged: the content of {name} has changed")
        except FileNotFoundError as error:
            raise DamagedError(f"checkpoint {folder} is damaged: {name} is missing") from error
        except OSError as error:
            raise unreadable(file, error) from error


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json``. Raises UserError where it cannot be read; DamagedError where it is not what was written."""
    try:
        return dict(parse_json((folder / STATE).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise DamagedError(f"checkpoint {folder} is damaged: {STATE} is missing") from error
    except OSError as error:
        raise unreadable(folder / STATE, error) from error
    except (ValueError, TypeError) as error:
        raise DamagedError(f"checkpoint {folder} is damaged: {STATE} is not what was written") from error


def read_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """``config.yaml``, complete: with the vocabulary that the run had.

    Raises:
        UserError: the file, or ``state.json``, cannot be read, or an override asks for another vocabulary.
    """
    run = load_config(folder / CONFIG, overrides, alone=True)
    vocab_size = read_state(folder).get("vocab_size")
    if not isinstance(vocab_size, int):
        raise UserError(f"checkpoint {folder} is damaged: {STATE} does not say its vocab_size")
    if run.model.vocab_size not in (None, vocab_size):
        raise UserError(
            f"model.vocab_size {run.model.vocab_size} is not that of checkpoint {folder}, which has {vocab_size} "
            "tokens: leave model.vocab_size out"
        )
    return run.for_vocabulary(vocab_size)
