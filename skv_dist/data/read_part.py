"""The rows of one part of a file, from any place on: what a stream reads, and where it goes on after a resume.

A file that several readers share is cut by its bytes (lines of JSON), by its rows (Parquet), or, where no place in it
can be found without reading what is before it (compressed files, lists), dealt out row by row. A *cursor* says how far
a part has been read. Whoever goes on from one seeks where the format lets it, and else passes over rows unparsed.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from skv_dist.data.read_file import (
    TEXT,
    holds_json_list,
    json_list,
    opened,
    parsed_line,
    refusal,
    refusing_unreadable,
    whole_text,
)

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: its multiples are spread evenly
_BATCH_ROWS = 256
_BUFFER = 1 << 20  # bytes of a Parquet column that wait


class Part(NamedTuple):
    """What lies in [begin, end) of a file of ``size`` bytes (of a shard on the hub: of as many equal pieces)."""

    file: str
    begin: int
    end: int
    size: int

    def holds(self, row: int) -> bool:
        """Whether row number ``row``, from 0, belongs to this part where rows are dealt out one by one."""
        return self.begin <= ((row * _GOLDEN) % 2**64 * self.size >> 64) < self.end

    def within(self, number: int) -> tuple[int, int]:
        """First and end of those of ``number`` equal pieces of the file (rows, row groups) that are in this part."""
        return -(-self.begin * number // self.size), -(-self.end * number // self.size)

    @property
    def is_whole(self) -> bool:
        return self.begin == 0 and self.end == self.size


class PlacedRow(NamedTuple):
    """A row of a part.

    Attributes:
        cursor: from which the rows behind this one are read.
        number: of the row in its file, from 1; put into words only where somebody asks, as that may read the file.
    """

    cursor: int
    number: object
    fields: dict[str, Any]


def part_rows(part: Part, file_format: str, fields: Sequence[str], cursor: int | None) -> Iterator[PlacedRow]:
    """The rows of a part.

    Args:
        cursor: of the row behind which to go on; None: from the begin of the part.

    Raises:
        UserError: the file cannot be read as ``file_format``, naming the place in it.
    """
    read = {"text": _text, "jsonl": _json, "parquet": _parquet}[file_format]
    with refusing_unreadable(part.file, file_format):
        yield from read(part, fields, cursor)


def _text(part: Part, fields: Sequence[str], cursor: int | None) -> Iterator[PlacedRow]:
    if part.begin == 0 and cursor is None:
        yield PlacedRow(1, 1, {TEXT: whole_text(part.file)})


def _json(part: Part, fields: Sequence[str], cursor: int | None) -> Iterator[PlacedRow]:
    with opened(part.file, "jsonl") as stream:
        if holds_json_list(stream):
            for number, row in json_list(part.file, stream.read(), fields):
                if number > (cursor or 0) and part.holds(number - 1):
                    yield PlacedRow(number, number, row)
        elif isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO):
            yield from _plain_lines(part, stream, fields, cursor)
        else:
            for number, line in enumerate(stream, 1):
                if number > (cursor or 0) and part.holds(number - 1) and not line.isspace():
                    yield PlacedRow(number, number, parsed_line(part.file, number, line, fields))


def _plain_lines(
    part: Part, stream: io.BufferedReader, fields: Sequence[str], cursor: int | None
) -> Iterator[PlacedRow]:
    """The lines that begin within the part; a cursor is the place of a line."""
    if cursor is not None:
        stream.seek(cursor)
    elif part.begin > stream.tell():
        stream.seek(part.begin - 1)
        stream.readline()  # its line begins in the part before, unless it is the end of one
    place = stream.tell()
    while place < part.end and (line := stream.readline()):
        number = _LineAt(part.file, place)
        place += len(line)
        if not line.isspace():
            yield PlacedRow(place, number, parsed_line(part.file, number, line, fields))


class _LineAt(NamedTuple):
    """The line that begins at a place of a file; as text its number, which is counted then."""

    file: str
    place: int

    def __str__(self) -> str:
        number, left = 1, self.place
        with open(self.file, "rb") as stream:
            while left and (data := stream.read(min(left, _BUFFER))):
                number += data.count(b"\n")
                left -= len(data)
        return str(number)


def _parquet(part: Part, fields: Sequence[str], cursor: int | None) -> Iterator[PlacedRow]:
    """The rows of the part, by their numbers; row groups before the first are not read."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        # Without pre-buffering: it would hold whole row groups, in as many files as there are lanes.
        with pyarrow.parquet.ParquetFile(part.file, pre_buffer=False, buffer_size=_BUFFER) as parquet:
            first, end = part.within(parquet.metadata.num_rows)
            row = max(first, cursor or 0)
            there = [field for field in fields if field in parquet.schema_arrow.names]
            if not there:
                yield from (PlacedRow(number, number, {}) for number in range(row + 1, end + 1))
                return
            begin = 0  # of the row group
            for group in range(parquet.num_row_groups):
                behind = begin + parquet.metadata.row_group(group).num_rows
                if begin < end and row < behind:
                    for batch in _batches(parquet, group, there, begin, row, end):
                        for values in batch.to_pylist():
                            row += 1
                            yield PlacedRow(row, row, values)
                begin = behind
    except pyarrow.ArrowException as error:
        where = f"behind row {row}: " if row else ""
        raise refusal(part.file, "parquet", f"{where}{error}") from error


def _batches(parquet: Any, group: int, columns: list[str], begin: int, row: int, end: int) -> Iterator[Any]:
    """Rows [row, end) as far as they are in a row group, which begins with row ``begin``."""
    for batch in parquet.iter_batches(row_groups=[group], columns=columns, batch_size=_BATCH_ROWS):
        if begin >= end:
            return
        skipped = min(max(0, row - begin), len(batch))
        yield batch.slice(skipped, max(0, min(len(batch), end - begin) - skipped))
        begin += len(batch)
