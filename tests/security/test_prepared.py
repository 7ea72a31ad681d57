"""Prepared sets whose files were made to do harm: opened rightly or refused in one line, and nothing is executed."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from skv_dist.config.data import DataConfig
from skv_dist.data.examples import TokenDocument
from skv_dist.data.open import open_data
from skv_dist.data.token_set import write_prepared
from skv_dist.data.tokenizer import ByteTokenizer
from skv_dist.errors import UserError
from tests.security.crafted import Touch

DOCUMENTS = 4
LENGTH = 40
_HEADER = 9 + 8 + 1  # bytes of tokens.idx before the two counts: its magic, version and type of tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ids = np.arange(LENGTH, dtype=np.int64) + 3
    write_prepared(
        tmp_path / "set", (TokenDocument(ids, number, None) for number in range(DOCUMENTS)), ByteTokenizer(), []
    )
    return tmp_path / "set"


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Path]:
    yield (file := tmp_path / "executed")
    assert not file.exists()


def read_all(folder: Path) -> int:
    """Opens the set and reads every sample of an epoch; how many there are."""
    config = DataConfig.model_validate(
        {
            "sequence_length": 8,
            "sources": [{"path": str(folder), "format": "prepared"}],
            "validation_fraction": 0,
        }
    )
    train, _ = open_data(config, ByteTokenizer(), 0, lambda: None)
    size = (DOCUMENTS * LENGTH - 1) // 8
    for position in range(size):
        tokens = train[position].tokens
        assert len(tokens) == 9
        assert (tokens >= 0).all()
        assert (tokens < ByteTokenizer.vocab_size).all()
    return size


def patched(folder: Path, offset: int, content: bytes) -> None:
    data = bytearray((folder / "tokens.idx").read_bytes())
    data[offset : offset + len(content)] = content
    (folder / "tokens.idx").write_bytes(bytes(data))


def counts(value: int, place: int = 0) -> Callable[[Path], None]:
    return lambda folder: patched(folder, _HEADER + 8 * place, struct.pack("<q", value))


def lengths(*values: int) -> Callable[[Path], None]:
    return lambda folder: patched(folder, _HEADER + 16, struct.pack(f"<{len(values)}i", *values))


def token_type(code: int) -> Callable[[Path], None]:
    return lambda folder: patched(folder, _HEADER - 1, struct.pack("<B", code))


def tokens(dtype: str, value: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = np.full(DOCUMENTS * LENGTH, value, dtype=dtype)
        (folder / "tokens.bin").write_bytes(data.tobytes())

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def meta(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "meta.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(counts(value, place) for value in (2**62, 2**31, -1, 0, DOCUMENTS + 2) for place in (0, 1)),
        lengths(-LENGTH, 3 * LENGTH, LENGTH, LENGTH),  # as many in all
        lengths(2**31 - 1, -(2**31 - 1), 2 * LENGTH, 2 * LENGTH),
        lengths(LENGTH + 1),
        *(token_type(code) for code in (0, 1, 6, 7, 9, 255)),
        both(token_type(7), tokens("<f4", 7)),  # numbers that are no integers
        both(token_type(4), tokens("<i4", -1)),
        both(token_type(4), tokens("<i4", 259)),  # no token of the vocabulary
        both(token_type(5), tokens("<i8", 2**40)),
        meta(tokenizer_fingerprint=["byte-v1"]),
        meta(content="zz"),
        meta(content=5),
        meta(content=""),
        meta(examples=True),
        meta(examples="no"),
    ],
)
def test_headers(folder: Path, change: Callable[[Path], None]) -> None:
    assert read_all(folder) == 19
    change(folder)
    with pytest.raises(UserError) as caught:
        read_all(folder)
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["meta.json", "tokens.idx", "tokens.bin", "documents.hash"])
def test_pickles(folder: Path, made: Path, name: str) -> None:
    for content in (pickle.dumps(Touch(made)), b""):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match="prepared data"):
            read_all(folder)


@pytest.mark.parametrize("name", ["meta.json", "tokens.idx", "tokens.bin", "documents.hash"])
def test_arrays_of_objects(folder: Path, made: Path, name: str) -> None:
    (folder / name).unlink()
    np.save(folder / "array.npy", np.array([Touch(made)], dtype=object), allow_pickle=True)
    os.rename(folder / "array.npy", folder / name)
    with pytest.raises(UserError, match="prepared data"):
        read_all(folder)


def test_what_lies_beside_is_not_read(folder: Path, made: Path) -> None:
    for name in ("tokens.pkl", "tokens.npy", "tokens.answer", "index-cache.npy"):
        (folder / name).write_bytes(pickle.dumps(Touch(made)))
    assert read_all(folder) == 19


@pytest.mark.parametrize("name", ["meta.json", "tokens.idx", "tokens.bin", "documents.hash"])
def test_pipes_are_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"prepared data .*: {name} is missing"):
        read_all(folder)


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "tokens.bin", tmp_path / "elsewhere")
    (folder / "tokens.bin").symlink_to(tmp_path / "elsewhere")
    assert read_all(folder) == 19
