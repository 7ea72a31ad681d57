"""Files and folders that appear whole or not at all: written under a hidden name, synced to disk, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skv_dist.errors import UserError

WRITING = ".writing"  # ends the name of whatever is not whole yet


def unfinished_path(path: Path) -> Path:
    """Where ``path`` is written before it appears: hidden, in the same folder, so that a rename is enough."""
    return path.with_name(f".{path.name}{WRITING}")


def write_synced(file: Path, text: str) -> None:
    """Write ``text`` as UTF-8 and wait until it is on disk."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
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

    Raises:
        UserError: ``out`` exists already, or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists already: remove it or choose another folder")
    # With the process in its name: two may make the same folder at once.
    unfinished = unfinished_path(out.with_name(f"{out.name}.{os.getpid()}"))
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        os.replace(unfinished, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
