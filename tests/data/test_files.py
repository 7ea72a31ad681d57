"""Local files: which are taken, what is read of them, and what is refused."""

import bz2
import codecs
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from skv_dist.config.data import SourceConfig
from skv_dist.data.local_files import format_of_all, local_files
from skv_dist.data.skipped import Skipped
from skv_dist.data.sources import documents
from skv_dist.errors import UserError

TEXTS = ["one", "two", "three"]


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


JSONL = _lines([{"text": text} for text in TEXTS])


def _read(path: Path, file_format: str = "jsonl", limit: float = 0.1, **keys: Any) -> tuple[list[str], str | None]:
    """The texts of a source, and what is reported at its end."""
    skipped = Skipped(str(path), limit)
    source = SourceConfig(path=str(path), format=file_format, **keys)
    return list(documents(source, skipped)), skipped.finish()


def _zstd(data: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


COMPRESSED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSONL", *(f".jsonl{end}" for end in COMPRESSED)])
def test_json_is_known_by_its_suffix(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESSED.get("." + suffix.rsplit(".", 1)[1], bytes)
    (tmp_path / f"a{suffix}").write_bytes(compress(JSONL))
    for path in (tmp_path, tmp_path / f"a{suffix}", tmp_path / "*"):
        assert format_of_all(str(path), []) == "jsonl"
        assert _read(path) == (TEXTS, None)


def test_a_folder_of_several_formats_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "README.md").write_text("words")
    with pytest.raises(UserError, match=r"jsonl \(a\.jsonl\), text \(README\.md\): say by --format"):
        format_of_all(str(tmp_path), [])
    assert format_of_all(str(tmp_path), ["*.md"]) == "jsonl"
    assert _read(tmp_path) == (TEXTS, None)  # once the format is said, the other files are left


def test_brackets_in_names_are_no_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "c[1]"
    folder.mkdir()
    (folder / "b[2].jsonl").write_bytes(JSONL)
    assert _read(folder / "b[2].jsonl") == (TEXTS, None)
    assert _read(folder) == (TEXTS, None)
    assert len(local_files(SourceConfig(path=f"{tmp_path}/*/*", format="jsonl"))) == 1


def test_other_fields_may_differ(tmp_path: Path) -> None:
    others: list[Any] = [{"n": 1}, {"n": "x"}, {"n": {"a": [1]}, "late": None}]
    (tmp_path / "a.jsonl").write_bytes(_lines([{"text": t, **other} for t, other in zip(TEXTS, others)]))
    assert _read(tmp_path) == (TEXTS, None)
    for name, column in (("a", [1, 2]), ("b", ["x", "y"])):
        table = pyarrow.table({"n": column, "text": [name, name * 2]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    assert _read(tmp_path, "parquet") == (["a", "aa", "b", "bb"], None)


def test_a_list_of_objects_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    assert _read(tmp_path) == (TEXTS, None)


def test_dates_blank_lines_and_lone_surrogates_are_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('\ufeff{"text": "2020-01-01 00:00:00"}\r\n\n{"text": "a\\ud800b"}\n   \n', encoding="utf-8")
    assert _read(file) == (["2020-01-01 00:00:00", "a\ud800b"], None)


def test_rows_without_text_are_counted_and_too_many_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(_lines([{"text": "a"}, {"text": None}, {"text": ""}, {"other": 1}, {"text": "b"}]))
    texts, report = _read(file)
    assert texts == ["a", "b"]
    assert report is not None
    assert "3 of 5 documents skipped: 1 empty, 1 null, 1 without a field 'text'; first" in report
    assert f"{file} row 2" in report
    with pytest.raises(UserError, match=r"3 of 5 documents skipped.*more than data\.max_skipped 0\.0 .*--max-skipped"):
        _read(file, limit=0.0)


def test_the_limit_is_for_the_whole_source(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(_lines([{"text": "a"}] * 1000 + [{"text": None}] * 250 + [{"text": "a"}] * 10000))
    assert len(_read(file)[0]) == 11000  # though there are more than a tenth for a while
    file.write_bytes(_lines([{"text": "a"}] * 9000 + [{"text": None}] * 2000 + [{"text": "a"}] * 30000))
    skipped = Skipped("stream", 0.1, streaming=True)
    with pytest.raises(UserError, match=r"1001 of 10001 documents"):  # a stream's end may never come
        list(documents(SourceConfig(path=str(file), format="jsonl"), skipped))
    file.write_bytes(_lines([{"text": None}] * 2000 + [{"text": "a"}]))
    with pytest.raises(UserError, match=r"1000 of 1000 documents"):  # nothing would mend this
        _read(file)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.txt", b"", r"1 empty; first .*a\.txt row 1"),
        ("a.jsonl", JSONL + b'{"text": 5}\n', r"a\.jsonl': row 4: field 'text' is int, not text"),
        ("a.jsonl", JSONL + b'{"text": \n', r"a\.jsonl' cannot be read as jsonl: line 4 is not a JSON object"),
        ("a.jsonl", JSONL + b"7\n", r"line 4 is not a JSON object"),
        ("a.jsonl", JSONL + b'{"text": "\xff"}\n', r"line 4 is not UTF-8"),
        ("a.jsonl", _lines([{"body": "x"}]), r"a\.jsonl': no row has a field 'text': set text_field"),
        ("a.txt", "words".encode("utf-16"), r"a\.txt' cannot be read as text: it is UTF-16"),
        ("a.jsonl", codecs.BOM_UTF16_LE + JSONL, r"it is UTF-16"),
        ("a.txt", "some words".encode("utf-16-le"), r"characters are no UTF-8 text"),
        ("a.txt", b"\x7fELF" + bytes(range(256)) * 9, r"a\.txt' cannot be read as text: .* no UTF-8 text"),
        ("a.txt", b"PK\x03\x04" + bytes(90), r"it is a zip archive: unpack it"),
        ("a.jsonl.gz", gzip.compress(JSONL)[:-9], r"a\.jsonl\.gz' cannot be read as jsonl: .*[Cc]ompressed"),
        ("a.jsonl.zst", _zstd(JSONL)[:-9], r"a\.jsonl\.zst' cannot be read as jsonl"),
        ("a.parquet", b"PAR1 no", r"a\.parquet' cannot be read as parquet"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(UserError, match=message):
        _read(file, format_of_all(str(file), []))


def test_texts_keep_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + ("é\r\nb" * 20 + "\0").encode())
    assert _read(tmp_path, "text") == (["é\nb" * 20 + "\0"], None)
    (tmp_path / "a.txt").write_bytes(b"a word of Latin-1: caf\xe9 au lait")
    texts, report = _read(tmp_path, "text")
    assert texts == ["a word of Latin-1: caf\ufffd au lait"]
    assert report is not None
    assert "a.txt is not all UTF-8" in report


def test_parquet_errors_name_the_row(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet': row 1: field 'text' is int"):
        _read(tmp_path, "parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 30 + [None]}), tmp_path / "a.parquet")
    assert _read(tmp_path, "parquet")[0] == ["a"] * 30
    with pytest.raises(UserError, match="no row has a field 'body'"):
        _read(tmp_path, "parquet", text_field="body")
