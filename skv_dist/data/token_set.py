"""Prepared token sets: Megatron-core's ``.bin``/``.idx`` files, memory-mapped, with a note on how they were made.

A folder holds ``tokens.bin`` and ``tokens.idx`` (megatron.core.datasets.indexed_dataset), ``meta.json``, and
``documents.hash``: 64 bits for the text of each document, which say whether it is held out. Sets of earlier versions
have no hashes. A set of examples has ``tokens.answer`` too: a byte for each token, 1 where a model is to answer it.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from skv_dist import __version__
from skv_dist.data.examples import TokenDocument
from skv_dist.data.mapped_tokens import MappedTokens
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError
from skv_dist.files import new_folder, parse_json

META = "meta.json"
TOKENS = "tokens.bin"
_HASHES = "documents.hash"
_ANSWERS = "tokens.answer"


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


class PreparedSet(MappedTokens):
    """What `write_prepared` wrote.

    Raises:
        UserError: a file is missing or damaged, or the set was made with another tokenizer.
    """

    _cure = "the file is damaged, prepare the data again"

    def __init__(self, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        self.folder, called, damaged = folder, f"prepared data {folder}", "meta.json or tokens.idx is damaged"
        for name in (META, TOKENS, "tokens.idx"):
            if not (folder / name).is_file():
                raise UserError(f"{called}: {name} is missing (make the set with 'skv-data prepare')")
        try:
            self.meta: dict[str, Any] = parse_json((folder / META).read_text())
            fingerprint, name = self.meta["tokenizer_fingerprint"], self.meta["tokenizer"]
            content = self.meta.get("content")
            if content is not None:
                int(content, 16)
        except Exception as error:
            raise UserError(f"{called}: {damaged}") from error
        if tokenizer is not None and fingerprint not in tokenizer.fingerprints():
            raise UserError(
                f"{called} was made with tokenizer '{name}', but data.tokenizer is '{tokenizer.name}' "
                "(or has changed since): prepare the data again or change data.tokenizer"
            )
        super().__init__(folder / "tokens", called, damaged, None if tokenizer is None else tokenizer.vocab_size)
        self.hashes = None if content is None else self._read_hashes()
        self.content = content or self._content_of_tokens()
        self.answers = self._read_answers() if self.meta.get("examples") else None

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
