"""Files and folders that appear whole or not at all: written under a hidden name, then renamed."""

import glob
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from skv_dist.errors import UserError

WRITING = ".writing"  # ends the name of whatever is not whole yet


def unfinished_path(path: Path) -> Path:
    """Where ``path`` is written before it appears: hidden, in the same folder, so that a rename is enough."""
    return path.with_name(f".{path.name}{WRITING}")


def parse_json(text: str) -> Any:
    """What a file that may be somebody else's says.

    Raises:
        ValueError: it is no JSON, or nested more deeply than anything of ours.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_synced(file: Path, content: str | bytes) -> None:
    """Write ``content``, text as UTF-8, and wait until it is on disk."""
    with file.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(file: Path, text: str) -> None:
    """Put ``text`` in the place of ``file``'s content. A reader, or a crash, sees the old or the new, never a part."""
    unfinished = unfinished_path(file)
    try:
        write_synced(unfinished, text)
        os.replace(unfinished, file)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` at the end and is removed if anything fails.

    Several processes, on hosts that share the disk, may make the same folder at once: each has a hidden name of its
    own. What a killed process of this host left behind is removed.

    Raises:
        UserError: ``out`` exists already, or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists already: remove it or choose another folder")
    _remove_leftovers(out)
    unfinished = unfinished_path(out.with_name(f"{_prefix(out)}{os.getpid()}"))
    made = [parent for parent in out.parents if not parent.exists()]  # the innermost first
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        os.replace(unfinished, out)
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not out.exists():
            with suppress(OSError):  # somebody else has put something there
                for parent in made:
                    parent.rmdir()


def _prefix(out: Path) -> str:
    return f"{out.name}.{socket.gethostname()}."


def _remove_leftovers(out: Path) -> None:
    """Unfinished forms of ``out`` whose process, on this host, is no more."""
    prefix = f".{_prefix(out)}"
    for leftover in out.parent.glob(f"{glob.escape(prefix)}*{WRITING}"):
        pid = leftover.name.removeprefix(prefix).removesuffix(WRITING)
        if pid == str(os.getpid()) or not Path("/proc", pid).exists():
            shutil.rmtree(leftover, ignore_errors=True)
