"""Sets that Megatron's own tools wrote, ``PREFIX.bin`` and ``PREFIX.idx``, and prepared ones written as such."""

import os
import shutil
from pathlib import Path

import numpy as np

from skv_dist.data.mapped_tokens import MappedTokens
from skv_dist.data.token_set import TOKENS, PreparedSet
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError
from skv_dist.files import unfinished_path

SUFFIXES = (".bin", ".idx")
_LOOKED_AT = 1000  # documents, evenly spread: each may be a read of its own from the disk


class MegatronSet(MappedTokens):
    """A set of Megatron's ``preprocess_data.py`` or of whatever else writes its format.

    It does not say which tokenizer made it, and holds no hashes of texts: documents are held out by their number.

    Args:
        path: the prefix, or one of the two files.

    Raises:
        UserError: a file is missing or damaged.
    """

    _cure = "was the set made with another tokenizer?"

    def __init__(self, path: str, tokenizer: Tokenizer) -> None:
        prefix, called = prefix_of(path), f"data source '{path}'"
        for file in files_of(prefix):
            if not file.is_file():
                raise UserError(f"{called}: there is no file {file}; path is what both names begin with")
        super().__init__(prefix, called, f"{prefix.name}.idx is no index of a text, or damaged", tokenizer.vocab_size)
        self.content = self._content_of_tokens()
        if os.environ.get("RANK", "0") == "0":
            self._warn_of_missing_ends(tokenizer.end_of_document)

    def _warn_of_missing_ends(self, end: int) -> None:
        last = self.offsets[1:][np.diff(self.offsets) > 0] - 1
        looked_at = last[:: max(1, len(last) // _LOOKED_AT)]
        missing = np.count_nonzero(self.tokens[looked_at] != end)
        if missing:
            print(
                f"{self._called}: {missing} of {len(looked_at)} documents looked at do not end with token {end}, the "
                "end of a document (--append-eod of Megatron's tools): they run into the next",
                flush=True,
            )


def prefix_of(path: str) -> Path:
    """What the two files of a set are called but for their suffix."""
    place = Path(path).expanduser()
    return place.with_suffix("") if place.suffix in SUFFIXES else place


def files_of(prefix: Path) -> tuple[Path, ...]:
    """The two files of a set, in the order of `SUFFIXES`."""
    return tuple(Path(f"{prefix}{suffix}") for suffix in SUFFIXES)


def export(folder: Path, prefix: Path) -> PreparedSet:
    """Write a prepared set as ``PREFIX.bin`` and ``PREFIX.idx``, which Megatron and this framework read.

    Args:
        prefix: as `prefix_of` returns it.

    Raises:
        UserError: it is no prepared set, its documents are examples, or a file is there already or cannot be written.
    """
    if prefix.name in ("", ".."):
        raise UserError(f"{prefix} is a folder: name what both files begin with, such as {prefix / folder.name}")
    prepared = PreparedSet(folder)
    if prepared.answers is not None:
        raise UserError(f"{folder} holds examples: Megatron's format cannot say which of their tokens are answers")
    files = files_of(prefix)
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists: choose another name, or remove it")
    try:
        for suffix, file in zip(SUFFIXES, files, strict=True):
            shutil.copyfile((folder / TOKENS).with_suffix(suffix), unfinished_path(file))
        for file in files:
            os.replace(unfinished_path(file), file)
    except OSError as error:
        raise UserError(f"cannot write {prefix}: {error.strerror}") from error
    finally:
        for file in files:
            unfinished_path(file).unlink(missing_ok=True)
    return prepared
