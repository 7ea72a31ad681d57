"""Raw documents from local text, JSONL, Parquet or the hub, through Hugging Face ``datasets``."""

import fnmatch
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skv_dist.config.data import SourceConfig
from skv_dist.errors import UserError

_BUILDERS = {"text": "text", "jsonl": "json", "parquet": "parquet"}
_SUFFIXES = {"text": "*", "jsonl": "*.jsonl*", "parquet": "*.parquet"}


def local_files(source: SourceConfig) -> list[str]:
    """The files of a local source, sorted: a file, every matching file of a folder, or a glob (``**`` recurses).

    Raises:
        UserError: nothing matches, or a file cannot be read.
    """
    pattern = os.path.expanduser(source.path)
    if os.path.isdir(pattern):
        pattern = os.path.join(pattern, "**", _SUFFIXES[source.format])
    files = sorted(f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
    files = [f for f in files if not any(fnmatch.fnmatch(f, exclude) for exclude in source.exclude)]
    if not files:
        raise UserError(f"data source '{source.path}': no file matches")
    for file in files:
        if not os.access(file, os.R_OK):
            raise UserError(f"data source '{file}': permission denied")
    return files


def open_source(source: SourceConfig, *, streaming: bool, cache_dir: str | None = None) -> Any:
    """A ``datasets.Dataset`` or, streaming, an ``IterableDataset``; a text file is one document.

    Raises:
        UserError: naming the file or the hub name that cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    options: dict[str, Any] = {"split": source.split, "streaming": streaming}
    if cache_dir is not None:
        options["cache_dir"] = str(Path(cache_dir).expanduser())
    try:
        if source.format == "hub":
            return datasets.load_dataset(source.path, source.name, **options)
        options["split"] = "train"
        if source.format == "text":
            options |= {"sample_by": "document", "encoding_errors": "replace"}
        return datasets.load_dataset(_BUILDERS[source.format], data_files=local_files(source), **options)
    except UserError:
        raise
    except Exception as error:  # datasets wraps a different class for each format
        raise UserError(_unreadable(source, error)) from error


def documents(source: SourceConfig, rows: Any) -> Iterator[str]:
    """The text of each row.

    Raises:
        UserError: a row lacks the text field or does not hold a string, or a file is damaged.
    """
    field = source.text_field
    iterator = iter(rows)
    index = 0
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # a damaged shard surfaces while iterating
            raise UserError(_unreadable(source, error)) from error
        if field not in row:
            raise UserError(
                f"data source '{source.path}': row {index} has no field '{field}' "
                f"(it has {', '.join(sorted(row))}): set text_field"
            )
        if not isinstance(row[field], str):
            raise UserError(
                f"data source '{source.path}': row {index}: field '{field}' is {type(row[field]).__name__}, not text"
            )
        yield row[field]
        index += 1


def _unreadable(source: SourceConfig, error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    name = source.path
    if source.format == "parquet":
        name = _first_damaged_parquet(source) or name
    return f"data source '{name}' cannot be read as {source.format}: {text}"


def _first_damaged_parquet(source: SourceConfig) -> str | None:
    """``datasets`` does not say which of many files is damaged; the footers tell."""
    import pyarrow.parquet

    for file in local_files(source):
        try:
            pyarrow.parquet.read_metadata(file)
        except Exception:
            return file
    return None
