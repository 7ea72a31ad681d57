"""Prepared token sets: Megatron-core's ``.bin``/``.idx`` files, memory-mapped, with a note on how they were made.

A folder holds ``tokens.bin`` and ``tokens.idx`` (megatron.core.datasets.indexed_dataset; any set that Megatron's own
tools wrote can be put there) and ``meta.json``.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from skv_dist import __version__
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError
from skv_dist.files import new_folder


def _token_dtype(vocab_size: int) -> type[np.number]:
    return np.uint16 if vocab_size <= 65536 else np.int32


def write_prepared(out: Path, token_documents: Iterable[np.ndarray], tokenizer: Tokenizer, sources: list[Any]) -> None:
    """Write a prepared set; it appears under ``out`` only once it is complete.

    Args:
        out: folder to create; must not exist.
        token_documents: int64 arrays [n], one a document, without the end token, which is added here.
        sources: what is noted of the origin in ``meta.json``.

    Raises:
        UserError: ``out`` exists, cannot be written, or there was no text at all (nothing is left behind).
    """
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    with new_folder(out) as unfinished:
        builder = IndexedDatasetBuilder(str(unfinished / "tokens.bin"), dtype=_token_dtype(tokenizer.vocab_size))
        num_tokens = num_documents = 0
        for ids in token_documents:
            if len(ids) == 0:
                continue
            builder.add_item(torch.from_numpy(np.append(ids, tokenizer.end_of_document)))
            builder.end_document()
            num_tokens += len(ids) + 1
            num_documents += 1
        if num_documents == 0:
            named = ", ".join(str(source.get("path")) for source in sources)
            raise UserError(f"data source '{named}' holds no text: every document is empty")
        builder.finalize(str(unfinished / "tokens.idx"))
        meta = {
            "format": 1,
            "tokenizer": tokenizer.name,
            "tokenizer_fingerprint": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "end_of_document": tokenizer.end_of_document,
            "documents": num_documents,
            "tokens": num_tokens,
            "sources": sources,
            "skv_dist": __version__,
        }
        (unfinished / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


class PreparedSet:
    """A memory-mapped token set.

    Attributes:
        tokens: every token of every document, one after another (np.memmap).
        offsets: int64 [documents + 1], where each document starts in ``tokens``.

    Raises:
        UserError: a file is missing or damaged, or the set was made with another tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.folder = folder
        for name in ("meta.json", "tokens.bin", "tokens.idx"):
            if not (folder / name).is_file():
                raise UserError(f"prepared data {folder}: {name} is missing (make the set with 'skv-data prepare')")
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
            fingerprint, name = self.meta["tokenizer_fingerprint"], self.meta["tokenizer"]
            index = IndexedDataset(str(folder / "tokens"), mmap=True).index
            lengths = np.asarray(index.sequence_lengths, dtype=np.int64)
        except Exception as error:
            raise UserError(f"prepared data {folder}: meta.json or tokens.idx is damaged") from error
        if tokenizer is not None and fingerprint != tokenizer.fingerprint():
            raise UserError(
                f"prepared data {folder} was made with tokenizer '{name}', but data.tokenizer is '{tokenizer.name}' "
                "(or has changed since): prepare the data again or change data.tokenizer"
            )
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        expected = int(self.offsets[-1]) * np.dtype(index.dtype).itemsize
        num_bytes = (folder / "tokens.bin").stat().st_size
        if num_bytes != expected:
            raise UserError(f"prepared data {folder}: tokens.bin has {num_bytes} bytes, tokens.idx says {expected}")
        self.tokens = np.memmap(folder / "tokens.bin", dtype=index.dtype, mode="r")

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1
