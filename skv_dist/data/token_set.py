"""Prepared token sets: Megatron-core's ``.bin``/``.idx`` files, memory-mapped, with a note on how they were made.

A folder holds ``tokens.bin`` and ``tokens.idx`` (megatron.core.datasets.indexed_dataset; any set that Megatron's own
tools wrote can be put there), ``meta.json``, and ``documents.hash``: 64 bits for the text of each document, which say
whether it is held out. Sets of Megatron's tools and of earlier versions have no hashes. A set of examples has
``tokens.answer`` too: a byte for each token, 1 where a model is to answer it.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from skv_dist import __version__
from skv_dist.data.examples import TokenDocument
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError
from skv_dist.files import new_folder, parse_json

META = "meta.json"
TOKENS = "tokens.bin"
_HASHES = "documents.hash"
_ANSWERS = "tokens.answer"
_SAMPLE = 1 << 16  # tokens


def _token_dtype(vocab_size: int) -> type[np.number]:
    return np.uint16 if vocab_size <= 65536 else np.int32


def write_prepared(out: Path, documents: Iterable[TokenDocument], tokenizer: Tokenizer, sources: list[Any]) -> None:
    """Write a prepared set; it appears under ``out`` only once it is complete.

    Args:
        out: folder to create; must not exist.
        documents: in order, all texts or all examples. Those without tokens are left out.
        sources: what is noted of the origin in ``meta.json``.

    Raises:
        UserError: ``out`` exists, cannot be written, or there was no text at all (nothing is left behind).
    """
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    with new_folder(out) as unfinished:
        builder = IndexedDatasetBuilder(str(unfinished / TOKENS), dtype=_token_dtype(tokenizer.vocab_size))
        num_tokens = num_documents = 0
        content = hashlib.sha256()
        if tokenizer.begin_of_document is not None:  # other tokens of the same text than in earlier versions
            content.update(f"begins with {tokenizer.begin_of_document}".encode())
        are_examples = False
        with (unfinished / _HASHES).open("wb") as hashes, (unfinished / _ANSWERS).open("wb") as answers:
            for ids, text_hash, answer in documents:
                if len(ids) == 0:
                    continue
                if num_documents and are_examples != (answer is not None):
                    raise UserError("a prepared set holds texts or examples, not both: prepare them apart")
                builder.add_item(torch.from_numpy(ids))
                builder.end_document()
                num_tokens += len(ids)
                num_documents += 1
                entry = text_hash.to_bytes(8, "little")
                hashes.write(entry)
                content.update(entry)
                if answer is not None:
                    are_examples = True
                    answers.write(answer.tobytes())
        if num_documents == 0:
            named = ", ".join(str(source.get("path")) for source in sources)
            raise UserError(f"data source '{named}' holds no text: every document is empty")
        builder.finalize(str(unfinished / "tokens.idx"))
        if not are_examples:
            (unfinished / _ANSWERS).unlink()
        meta = {
            "format": 1,
            "tokenizer": tokenizer.name,
            "tokenizer_fingerprint": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "begin_of_document": tokenizer.begin_of_document,
            "end_of_document": tokenizer.end_of_document,
            "examples": are_examples,
            "documents": num_documents,
            "tokens": num_tokens,
            "content": content.hexdigest(),
            "sources": sources,
            "skv_dist": __version__,
        }
        (unfinished / META).write_text(json.dumps(meta, indent=2) + "\n")


class PreparedSet:
    """A memory-mapped token set.

    Attributes:
        tokens: every token of every document, one after another (np.memmap).
        offsets: int64 [documents + 1], where each document starts in ``tokens``.
        hashes: uint64 [documents], of their texts; None for sets that were made without.
        answers: bool [tokens], those that a model is to answer; None where the documents are no examples.
        content: hexadecimal digits that tell this set's data from another's, wherever it lies.

    Raises:
        UserError: a file is missing or damaged, or the set was made with another tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.folder = folder
        for name in (META, TOKENS, "tokens.idx"):
            if not (folder / name).is_file():
                raise UserError(f"prepared data {folder}: {name} is missing (make the set with 'skv-data prepare')")
        try:
            self.meta: dict[str, Any] = parse_json((folder / META).read_text())
            fingerprint, name = self.meta["tokenizer_fingerprint"], self.meta["tokenizer"]
            index = IndexedDataset(str(folder / "tokens"), mmap=True).index
            lengths = np.asarray(index.sequence_lengths, dtype=np.int64)
            if np.dtype(index.dtype).kind not in "iu" or (lengths < 0).any():
                raise ValueError
            content = self.meta.get("content")
            if content is not None:
                int(content, 16)
        except Exception as error:
            raise UserError(f"prepared data {folder}: meta.json or tokens.idx is damaged") from error
        if tokenizer is not None and fingerprint not in tokenizer.fingerprints():
            raise UserError(
                f"prepared data {folder} was made with tokenizer '{name}', but data.tokenizer is '{tokenizer.name}' "
                "(or has changed since): prepare the data again or change data.tokenizer"
            )
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        expected = int(self.offsets[-1]) * np.dtype(index.dtype).itemsize
        num_bytes = (folder / TOKENS).stat().st_size
        if num_bytes != expected:
            raise UserError(f"prepared data {folder}: tokens.bin has {num_bytes} bytes, tokens.idx says {expected}")
        self.tokens = np.memmap(folder / TOKENS, dtype=index.dtype, mode="r")
        self._vocab_size = None if tokenizer is None else tokenizer.vocab_size
        self.hashes = None if content is None else self._read_hashes()
        self.content: str = content or self._content_of_tokens()
        self.answers = self._read_answers() if self.meta.get("examples") else None

    def read(self, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of all, int64.

        Raises:
            UserError: one is no token of the tokenizer. A model would look it up outside its embedding.
        """
        tokens = np.asarray(self.tokens[begin:end], dtype=np.int64)
        if self._vocab_size is not None and len(tokens):
            wrong = np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))
            if len(wrong):
                raise UserError(
                    f"prepared data {self.folder}: token {begin + wrong[0]} of tokens.bin is {tokens[wrong[0]]}, but "
                    f"the tokenizer has {self._vocab_size}: the file is damaged, prepare the data again"
                )
        return tokens

    def _read_hashes(self) -> np.ndarray:
        return self._mapped(_HASHES, "<u8", self.num_documents)  # without them other documents would be held out

    def _read_answers(self) -> np.ndarray:
        return self._mapped(_ANSWERS, "bool", len(self.tokens))

    def _mapped(self, name: str, dtype: str, size: int) -> np.ndarray:
        file = self.folder / name
        if not file.is_file():
            raise UserError(f"prepared data {self.folder}: {name} is missing: copy it too, or prepare the data again")
        num_bytes, expected = file.stat().st_size, np.dtype(dtype).itemsize * size
        if num_bytes != expected:
            raise UserError(f"prepared data {self.folder}: {name} has {num_bytes} bytes instead of {expected}")
        return np.memmap(file, dtype=dtype, mode="r")

    def _content_of_tokens(self) -> str:
        """From the lengths of all documents and a sample of the tokens: reading all would take minutes."""
        digest = hashlib.sha256(self.offsets.astype("<i8").tobytes())
        for part in (self.tokens[:_SAMPLE], self.tokens[-_SAMPLE:]):
            digest.update(np.asarray(part, dtype="<i8").tobytes())
        return digest.hexdigest()

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1
