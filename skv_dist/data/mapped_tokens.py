"""Tokens of many documents in Megatron-core's ``.bin``/``.idx`` files, mapped into memory."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from skv_dist.errors import UserError

_SAMPLE = 1 << 16  # tokens


class MappedTokens:
    """Attributes:
        tokens: every token of every document, one after another (np.memmap).
        offsets: int64 [documents + 1], where each document starts in ``tokens``.
        hashes: uint64 [documents], of their texts; None for sets that were made without.
        answers: bool [tokens], those that a model is to answer; None where the documents are no examples.
        content: hexadecimal digits that tell this set's data from another's, wherever it lies.

    Args:
        prefix: of the two files, without ``.bin`` and ``.idx``.
        called: the set, at the beginning of messages.
        damaged: what is said of an index that cannot be read.
        vocab_size: of the tokenizer; None: tokens are not checked.

    Raises:
        UserError: a file is damaged.
    """

    hashes: np.ndarray | None = None
    answers: np.ndarray | None = None
    content: str

    def __init__(self, prefix: Path, called: str, damaged: str, vocab_size: int | None) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self._called, self._vocab_size = called, vocab_size
        self._file = Path(f"{prefix}.bin")
        try:
            index = IndexedDataset(str(prefix), mmap=True).index
            lengths = np.asarray(index.sequence_lengths, dtype=np.int64)
            of_sequences = np.concatenate([[0], np.cumsum(lengths)])
            documents = np.asarray(index.document_indices, dtype=np.int64)
            self._check(index, lengths, of_sequences[:-1], documents)
        except Exception as error:
            raise UserError(f"{called}: {damaged}") from error
        self.offsets = of_sequences[documents]
        expected, num_bytes = int(of_sequences[-1]) * np.dtype(index.dtype).itemsize, self._file.stat().st_size
        if num_bytes != expected:
            raise UserError(f"{called}: {self._file.name} has {num_bytes} bytes, {prefix.name}.idx says {expected}")
        self.tokens = np.memmap(self._file, dtype=index.dtype, mode="r")

    @staticmethod
    def _check(index: Any, lengths: np.ndarray, begins: np.ndarray, documents: np.ndarray) -> None:
        """Raises ValueError where an index makes no sense, or says what is not read here."""
        itemsize = np.dtype(index.dtype).itemsize
        if np.dtype(index.dtype).kind not in "iu" or (lengths < 0).any():
            raise ValueError("these are no tokens")
        if index.sequence_modes is not None or not np.array_equal(index.sequence_pointers, begins * itemsize):
            raise ValueError("sequences do not lie end to end, or are no text")
        if documents[0] != 0 or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
            raise ValueError("documents are not made of all sequences in their order")

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

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
                    f"{self._called}: token {begin + wrong[0]} of {self._file.name} is {tokens[wrong[0]]}, but the "
                    f"tokenizer has {self._vocab_size}: {self._cure}"
                )
        return tokens

    _cure = "the file is damaged"

    def _content_of_tokens(self) -> str:
        """From the lengths of all documents and a sample of the tokens: reading all would take minutes."""
        digest = hashlib.sha256(self.offsets.astype("<i8").tobytes())
        for part in (self.tokens[:_SAMPLE], self.tokens[-_SAMPLE:]):
            digest.update(np.asarray(part, dtype="<i8").tobytes())
        return digest.hexdigest()
