"""Damaged files of text: refused in one line that names the file, or read without a loss."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skv_dist.config.data import SourceConfig
from skv_dist.data.skipped import Skipped
from skv_dist.data.sources import documents
from skv_dist.errors import UserError
from tests.fuzz.bounds import bounded, examples
from tests.fuzz.conftest import fresh
from tests.fuzz.damage import Damage, damages

TEXTS = [f'text {number} é日 "quoted" \\ {"x" * (number % 7)}' for number in range(40)]
JSONL = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()


def _zstd(data: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return bytes(out.getvalue().to_pybytes())


def _parquet(_: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), out)
    return bytes(out.getvalue().to_pybytes())


def read(file: Path, file_format: str) -> tuple[list[str], str | None]:
    """The texts, and what is reported at the end; any number of rows may be skipped, if they are counted."""
    skipped = Skipped(str(file), 1.0)
    source = SourceConfig(path=str(file), format=file_format)
    with bounded():
        return [str(text) for text in documents(source, skipped)], skipped.finish()


def refusal_of(file: Path, file_format: str) -> tuple[list[str], str | None, str | None]:
    """As `read`, and a refusal in their place."""
    try:
        texts, report = read(file, file_format)
    except UserError as error:
        refusal = str(error)
    else:
        return texts, report, None
    assert str(file) in refusal
    assert "\n" not in refusal
    return [], None, refusal


_COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": _zstd,
}


@examples(200)
@given(damage=damages)
def test_jsonl(work: Path, damage: Damage) -> None:
    """Every line that is as it was comes out, in order."""
    data = damage(JSONL)
    (file := fresh(work) / "a.jsonl").write_bytes(data)
    texts, _, refusal = refusal_of(file, "jsonl")
    if refusal is None:
        unharmed = [text for text, line in zip(TEXTS, JSONL.splitlines()) if line in data.splitlines()]
        remaining = iter(texts)
        assert all(text in remaining for text in unharmed)


@pytest.mark.parametrize("suffix", _COMPRESSED)
@examples(60)
@given(damage=damages)
def test_compressed(work: Path, suffix: str, damage: Damage) -> None:
    """The sums in it tell."""
    data = damage(_COMPRESSED[suffix](JSONL))
    (file := fresh(work) / f"a.jsonl.{suffix}").write_bytes(data)
    texts, _, refusal = refusal_of(file, "jsonl")
    assert refusal is not None or texts == TEXTS or not data


@examples(100)
@given(damage=damages)
def test_parquet(work: Path, damage: Damage) -> None:
    """Its pages have no sums: a changed letter is read as it is (docs/security.md), but no row is lost."""
    (file := fresh(work) / "a.parquet").write_bytes(damage(_parquet(b"")))
    texts, report, refusal = refusal_of(file, "parquet")
    assert refusal is not None or len(texts) == len(TEXTS) or report is not None


@examples(60)
@given(damage=damages)
def test_text(work: Path, damage: Damage) -> None:
    data = damage("\n".join(TEXTS).encode())
    (file := fresh(work) / "a.txt").write_bytes(data)
    texts, _, refusal = refusal_of(file, "text")
    if refusal is None and data:
        right = data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
        assert texts == [right]


_ROWS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=3),
    max_leaves=6,
)


@examples(150)
@given(rows=st.lists(_ROWS, max_size=6), as_list=st.booleans())
def test_json_of_any_form(work: Path, rows: list[object], as_list: bool) -> None:
    """Each row gives its text, is counted as skipped, or is refused."""
    data = json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows)
    (file := fresh(work) / "a.json").write_text(data)
    texts, report, refusal = refusal_of(file, "jsonl")
    if refusal is None:
        wanted = [row["text"] for row in rows if isinstance(row, dict) and row.get("text") not in (None, "", [])]
        assert texts == wanted
        assert len(texts) == len(rows) or report is not None
