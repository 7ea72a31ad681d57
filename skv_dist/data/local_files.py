"""Which local files a source has, and what their names say of their format."""

import fnmatch
import glob
import os
from pathlib import Path

from skv_dist.config.data import SourceConfig
from skv_dist.errors import UserError

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


def format_of(file: str) -> str:
    """By the suffix, however it is written and compressed. What no suffix tells is text."""
    name = file.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return _FORMATS.get(os.path.splitext(name)[1], "text")


def format_of_all(
    path: str, exclude: list[str], cure: str = "say by --format which are meant, or leave files out by --exclude"
) -> str:
    """The format of a file, or of all files of a folder or glob.

    Args:
        cure: what to do where they differ, in the words of the command that asks.

    Raises:
        UserError: they differ.
    """
    examples = {format_of(file): file for file in reversed(_matching(path, exclude))}
    if len(examples) > 1:
        named = ", ".join(f"{name} ({os.path.basename(file)})" for name, file in sorted(examples.items()))
        raise UserError(f"'{path}' holds files of several formats: {named}: {cure}")
    return next(iter(examples), format_of(path))


def local_files(source: SourceConfig) -> list[str]:
    """The files of a local source, sorted: a file, every file of this format in a folder, or a glob (** recurses).

    Raises:
        UserError: nothing matches, or a file cannot be read.
    """
    files = _matching(source.path, source.exclude)
    if source.format != "text" and Path(source.path).expanduser().is_dir():
        files = [file for file in files if format_of(file) == source.format]
    if not files:
        raise UserError(f"data source '{source.path}': no file matches")
    for file in files:
        if not os.access(file, os.R_OK):
            raise UserError(f"data source '{file}': permission denied")
    return files


def _matching(path: str, exclude: list[str]) -> list[str]:
    pattern = os.path.expanduser(path)
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**", "*")
    elif os.path.exists(pattern):  # brackets in the name of a file are no pattern
        pattern = glob.escape(pattern)
    files = sorted(file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file))
    return [file for file in files if not any(fnmatch.fnmatch(file, pattern) for pattern in exclude)]
