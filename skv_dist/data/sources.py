"""Raw documents from local text, JSONL and Parquet files, or from the hub through Hugging Face ``datasets``."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from skv_dist.config.data import SourceConfig
from skv_dist.data.local_files import local_files
from skv_dist.data.read_file import MISSING, Row, rows
from skv_dist.data.skipped import Skipped
from skv_dist.errors import UserError


def documents(
    source: SourceConfig,
    skipped: Skipped,
    *,
    cache_dir: str | None = None,
    files: Sequence[str] | None = None,
    streaming: bool = False,
    order: tuple[int, int] | None = None,
) -> Iterator[str]:
    """Every text of a source that holds one.

    Args:
        skipped: counts the others.
        files: of a local source, in the order in which they are read; all, sorted, where it is None.
        streaming: a hub dataset is not loaded down first.
        order: seed and epoch that shuffle the files of a hub dataset that is streamed.

    Raises:
        UserError: a file, or the hub, cannot be read, or a text is none; naming file and row.
    """
    if source.format == "hub":
        rows_of_hub = _hub_rows(source, cache_dir, streaming, order)
        yield from _texts(rows_of_hub, source.text_field, source.path, skipped)
        return
    for file in local_files(source) if files is None else files:
        for text in _texts(rows(file, source.format, source.text_field), source.text_field, file, skipped):
            if source.format == "text" and "\ufffd" in text:
                skipped.note_replaced(file)
            yield text


def _texts(numbered: Iterable[Row], field: str, file: str, skipped: Skipped) -> Iterator[str]:
    num_rows = num_missing = 0
    for number, value in numbered:
        num_rows += 1
        skipped.num_rows += 1
        if isinstance(value, str) and value:
            yield value
        elif value is None or value == "":
            skipped.skip("null" if value is None else "empty", f"{file} row {number}")
        elif value is MISSING:
            num_missing += 1
            skipped.skip(f"without a field '{field}'", f"{file} row {number}")
        else:
            raise UserError(
                f"data source '{file}': row {number}: field '{field}' is {type(value).__name__}, not text: "
                "set text_field, or mend the file"
            )
    if num_rows == 0:
        skipped.note_empty_file(file)
    elif num_missing == num_rows:
        raise UserError(f"data source '{file}': no row has a field '{field}': set text_field, or leave the file out")


def _hub_rows(
    source: SourceConfig, cache_dir: str | None, streaming: bool, order: tuple[int, int] | None
) -> Iterator[Row]:
    """The rows of a hub dataset, numbered from 1.

    Raises:
        UserError: naming the dataset that cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    options: dict[str, Any] = {"split": source.split, "streaming": streaming}
    if cache_dir is not None:
        options["cache_dir"] = str(Path(cache_dir).expanduser())
    try:
        dataset = datasets.load_dataset(source.path, source.name, **options)
        if source.text_field in (dataset.column_names or []):
            dataset = dataset.select_columns([source.text_field])
        if order is not None:
            dataset = dataset.shuffle(seed=sum(order), buffer_size=1)
        for number, row in enumerate(dataset, 1):
            yield number, row.get(source.text_field, MISSING)
    except Exception as error:  # datasets raises a different class for each way this can fail
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(f"data source '{source.path}' cannot be read from the hub: {reason}") from error
