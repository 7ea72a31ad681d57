"""Tokenize raw sources once, into a folder that every later run maps into memory."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from skv_dist.config.data import SourceConfig
from skv_dist.data.sources import documents, local_files, open_source
from skv_dist.data.token_set import write_prepared
from skv_dist.data.tokenizer import Tokenizer

_BATCH = 64  # documents handed to a worker at once


def _tokenized(
    sources: list[SourceConfig], tokenizer: Tokenizer, workers: int, cache_dir: str | None, progress: bool
) -> Iterator[np.ndarray]:
    from multiprocessing import get_context

    for source in sources:
        rows = open_source(source, streaming=False, cache_dir=cache_dir)
        texts = tqdm(
            documents(source, rows),
            total=len(rows),
            desc=f"tokenize {source.path}",
            unit="doc",
            disable=not progress,
        )
        if workers == 1:
            yield from map(tokenizer.encode, texts)
            continue
        with get_context("spawn").Pool(workers) as pool:
            yield from pool.imap(tokenizer.encode, texts, chunksize=_BATCH)


def prepare(
    sources: list[SourceConfig],
    tokenizer: Tokenizer,
    out: Path,
    *,
    workers: int = 1,
    cache_dir: str | None = None,
    progress: bool = True,
) -> None:
    """Tokenize ``sources`` in order into a prepared set at ``out``.

    Raises:
        UserError: a source cannot be read, holds no text, or ``out`` exists; nothing is left behind.
    """
    token_documents = _tokenized(sources, tokenizer, workers, cache_dir, progress)
    write_prepared(out, token_documents, tokenizer, [source.model_dump() for source in sources])


def cached_folder(source: SourceConfig, tokenizer: Tokenizer, cache_dir: str) -> Path:
    """Where the prepared form of a raw source is kept; changes with its files, their times and the tokenizer."""
    files = [] if source.format == "hub" else local_files(source)
    state = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    identity = [source.model_dump(exclude={"weight"}), state, tokenizer.fingerprint()]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    return Path(cache_dir).expanduser() / "prepared" / digest
