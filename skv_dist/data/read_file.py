"""The rows of one local file; nothing but the fields that are asked for is looked at."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from skv_dist.errors import UserError

TEXT = "text"  # the field of a text file's one row
Row = tuple[int, dict[str, Any]]  # number within its file, from 1, and those of the fields that it has

_SNIFFED = 1 << 16  # bytes from which encodings are judged
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ARCHIVES = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf": "a 7z archive"}
_OTHER_ENCODINGS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MAX_UNREADABLE = 0.1  # part of a text's characters that may be no UTF-8; Latin-1 prose has less, binary files more


def rows(file: str, file_format: str, fields: Sequence[str]) -> Iterator[Row]:
    """The rows of a file.

    Args:
        fields: that are read.

    Raises:
        UserError: it cannot be read as ``file_format``, naming the place in it.
    """
    read = {"text": _text, "jsonl": _json, "parquet": _parquet}[file_format]
    with refusing_unreadable(file, file_format):
        yield from read(file, fields)


@contextmanager
def refusing_unreadable(file: str, file_format: str) -> Iterator[None]:
    """What the system or a decompressor says of a file, as a `UserError`."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise refusal(file, file_format, str(error) or type(error).__name__) from error


def refusal(file: str, file_format: str, reason: str) -> UserError:
    return UserError(f"data source '{file}' cannot be read as {file_format}: {' '.join(reason.split())}")


def opened(file: str, file_format: str) -> BinaryIO:
    """The file, decompressed as its first bytes say, behind the mark of UTF-8 if there is one.

    Raises:
        UserError: it is an archive, or no UTF-8.
    """
    plain = open(file, "rb")  # noqa: SIM115 (closed by the reader of the stream)
    begin = plain.peek(8)[:8]
    for magic, name in _ARCHIVES.items():
        if begin.startswith(magic):
            raise refusal(file, file_format, f"it is {name}: unpack it")
    method = next((name for magic, name in _MAGIC.items() if begin.startswith(magic)), None)
    stream = io.BufferedReader(_decompressed(plain, method), _SNIFFED) if method else plain
    begin = stream.peek(4)[:4]
    if begin.startswith(_OTHER_ENCODINGS):
        raise refusal(file, file_format, "it is UTF-16 or UTF-32: convert it to UTF-8")
    if begin.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return stream


def _decompressed(plain: BinaryIO, method: str) -> Any:
    if method == "gzip":
        return gzip.GzipFile(fileobj=plain)
    if method == "bz2":
        return bz2.BZ2File(plain)
    if method == "xz":
        return lzma.LZMAFile(plain)
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise OSError("this pyarrow has no zstd: pip install pyarrow from PyPI, or decompress the file")
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(plain, mode="r"), "zstd")


def _text(file: str, fields: Sequence[str]) -> Iterator[Row]:
    yield 1, {TEXT: whole_text(file)}


def whole_text(file: str) -> str:
    """What a text file holds.

    Raises:
        UserError: it holds something else.
    """
    with opened(file, "text") as stream:
        data = stream.read()
    text = data.decode("utf-8", errors="replace")
    begin = text[:_SNIFFED]
    unreadable = begin.count("\ufffd") + begin.count("\0")
    if unreadable > _MAX_UNREADABLE * len(begin):
        raise refusal(
            file, "text", f"{unreadable} of its first {len(begin)} characters are no UTF-8 text: convert or exclude it"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json(file: str, fields: Sequence[str]) -> Iterator[Row]:
    with opened(file, "jsonl") as stream:
        if holds_json_list(stream):
            yield from json_list(file, stream.read(), fields)
            return
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield number, parsed_line(file, number, line, fields)


def holds_json_list(stream: BinaryIO) -> bool:
    """Whether an opened file is one list of objects, as many named .json are; nothing of it is taken."""
    begin: bytes = stream.peek(_SNIFFED)[:_SNIFFED]  # type: ignore[attr-defined]
    return begin.lstrip().startswith(b"[")


def parsed_line(file: str, number: object, line: bytes, fields: Sequence[str]) -> dict[str, Any]:
    """Those of ``fields`` that the object in a line has.

    Args:
        number: of the line; it is put into words where something is wrong.

    Raises:
        UserError: the line holds no object.
    """
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise refusal(file, "jsonl", f"line {number} is not UTF-8: convert or exclude the file") from error
    except (ValueError, RecursionError) as error:
        raise refusal(file, "jsonl", f"line {number} is not a JSON object ({error})") from error
    return _chosen(value, fields, file, "line", number)


def json_list(file: str, data: bytes, fields: Sequence[str]) -> Iterator[Row]:
    """The rows of a file that holds one list of objects.

    Raises:
        UserError: it does not.
    """
    try:
        values = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise refusal(file, "jsonl", "it is not UTF-8: convert or exclude it") from error
    except (ValueError, RecursionError) as error:
        raise refusal(file, "jsonl", f"it begins with [ but is no JSON list ({error})") from error
    for number, value in enumerate(values, 1):
        yield number, _chosen(value, fields, file, "entry", number)


def _chosen(value: Any, fields: Sequence[str], file: str, kind: str, number: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refusal(file, "jsonl", f"{kind} {number} is not a JSON object")
    return {field: value[field] for field in fields if field in value}


def _parquet(file: str, fields: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        there = [field for field in fields if field in parquet.schema_arrow.names]
        if not there:
            yield from ((row, {}) for row in range(1, parquet.metadata.num_rows + 1))
            return
        for batch in parquet.iter_batches(columns=there, batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        where = f"behind row {number}: " if number else ""
        raise refusal(file, "parquet", f"{where}{error}") from error
