"""Raw documents from local text, JSONL and Parquet files, or from the hub through Hugging Face ``datasets``."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skv_dist.config.data import SourceConfig
from skv_dist.data.examples import Document
from skv_dist.data.local_files import local_files
from skv_dist.data.read_file import Row, rows
from skv_dist.data.row_documents import DocumentOfRow, NoDocumentError, document_of_row
from skv_dist.data.skipped import Skipped
from skv_dist.errors import UserError


def documents(
    source: SourceConfig,
    skipped: Skipped,
    *,
    cache_dir: str | None = None,
    streaming: bool = False,
) -> Iterator[Document]:
    """Every document of a source.

    Args:
        skipped: counts the rows that hold none.
        streaming: a hub dataset is not loaded down first.

    Raises:
        UserError: a file, or the hub, cannot be read, or a field holds what it must not; naming file and row.
    """
    of_row = document_of_row(source)
    if source.format == "hub":
        hub_rows = _hub_rows(source, of_row.fields, cache_dir, streaming)
        yield from _of_rows(hub_rows, of_row, source.path, skipped)
        return
    for file in local_files(source):
        for document in _of_rows(rows(file, source.format, of_row.fields), of_row, file, skipped):
            if source.format == "text" and "\ufffd" in document:
                skipped.note_replaced(file)
            yield document


def _of_rows(numbered: Iterable[Row], of_row: DocumentOfRow, file: str, skipped: Skipped) -> Iterator[Document]:
    num_rows = num_missing = 0
    for number, row in numbered:
        num_rows += 1
        skipped.num_rows += 1
        try:
            document = of_row(row, f"{file}' row {number}")
        except NoDocumentError as none:
            num_missing += none.is_missing
            skipped.skip(none.reason, f"{file} row {number}")
        except UserError as error:
            raise UserError(f"data source '{file}': row {number}: {error}") from error
        else:
            yield document
    if num_rows == 0:
        skipped.note_empty_file(file)
    elif num_missing == num_rows:
        named = " or ".join(f"'{field}'" for field in of_row.fields)
        raise UserError(f"data source '{file}': no row has a field {named}: set {of_row.keys}, or leave the file out")


def _hub_rows(source: SourceConfig, fields: Sequence[str], cache_dir: str | None, streaming: bool) -> Iterator[Row]:
    """The rows of a hub dataset, numbered from 1.

    Raises:
        UserError: naming the dataset that cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    options: dict[str, Any] = {"split": source.split, "streaming": streaming}
    if cache_dir is not None:
        options["cache_dir"] = str(Path(cache_dir).expanduser())
    with naming_dataset(source.path):
        dataset = with_columns(datasets.load_dataset(source.path, source.name, **options), fields)
        for number, row in enumerate(dataset, 1):
            yield number, {field: row[field] for field in fields if field in row}


def with_columns(dataset: Any, fields: Sequence[str]) -> Any:
    """The dataset with those of ``fields`` alone that it has; unchanged where it has none of them."""
    there = [field for field in fields if field in (dataset.column_names or [])]
    return dataset.select_columns(there) if there else dataset


@contextmanager
def naming_dataset(path: str) -> Iterator[None]:
    """Whatever goes wrong inside is a `UserError` that names the hub dataset ``path``."""
    try:
        yield
    except Exception as error:  # datasets raises a different class for each way this can fail
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(f"data source '{path}' cannot be read from the hub: {reason}") from error
