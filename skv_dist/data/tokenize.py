"""Tokenize raw sources once, into a folder that every later run maps into memory."""

import hashlib
import json
import os
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from skv_dist.config.data import SourceConfig
from skv_dist.data.encoders import encoded
from skv_dist.data.examples import TokenDocument
from skv_dist.data.local_files import local_files
from skv_dist.data.making import made_once, making, pass_abandoned
from skv_dist.data.skipped import Skipped
from skv_dist.data.sources import documents
from skv_dist.data.token_set import write_prepared
from skv_dist.data.tokenizer import Tokenizer


def _tokenized(
    sources: list[SourceConfig],
    tokenizer: Tokenizer,
    workers: int,
    cache_dir: str | None,
    max_skipped: float,
    progress: bool,
) -> Generator[TokenDocument, None, None]:
    for source in sources:
        skipped = Skipped(source.path, max_skipped)
        texts = tqdm(
            documents(source, skipped, cache_dir=cache_dir),
            desc=f"tokenize {source.path}",
            unit="doc",
            disable=not progress,
        )
        with closing(texts), closing(encoded(texts, tokenizer, workers)) as done:
            yield from done
        report = skipped.finish()
        if report:
            print(report, flush=True)


def prepare(
    sources: list[SourceConfig],
    tokenizer: Tokenizer,
    out: Path,
    *,
    workers: int = 1,
    cache_dir: str | None = None,
    max_skipped: float = 0.1,
    progress: bool = True,
) -> None:
    """Tokenize ``sources`` in order into a prepared set at ``out``.

    Args:
        max_skipped: largest part of a source's documents that may hold no text (``data.max_skipped``).

    Raises:
        UserError: a source cannot be read, holds no text, or ``out`` exists or is being made; nothing is left behind.
    """
    pass_abandoned(out)
    with making(out):
        _prepare(sources, tokenizer, out, workers, cache_dir, max_skipped, progress)


def _prepare(
    sources: list[SourceConfig],
    tokenizer: Tokenizer,
    out: Path,
    workers: int,
    cache_dir: str | None,
    max_skipped: float,
    progress: bool,
) -> None:
    token_documents = _tokenized(sources, tokenizer, workers, cache_dir, max_skipped, progress)
    with closing(token_documents):
        write_prepared(out, token_documents, tokenizer, [source.model_dump() for source in sources])


def prepared_once(
    source: SourceConfig, tokenizer: Tokenizer, *, workers: int, cache_dir: str, max_skipped: float
) -> Path:
    """The folder in ``cache_dir`` with the prepared form of a raw source, made by the first process that wants it."""
    folders = _cached_folders(source, tokenizer, cache_dir)
    for folder in folders:
        if folder.exists():
            return folder

    def make() -> None:
        _prepare([source], tokenizer, folders[0], workers, cache_dir, max_skipped, True)

    return made_once(folders[0], make)


def _cached_folders(source: SourceConfig, tokenizer: Tokenizer, cache_dir: str) -> list[Path]:
    """Where the prepared form of a raw source is kept; changes with its files, their times and the tokenizer.

    The first is today's; earlier versions knew the same tokenizer by other fingerprints.
    """
    files = [] if source.format == "hub" else local_files(source)
    state = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    unused = {key for key in ("prompt_field", "response_field", "messages_field") if getattr(source, key) is None}
    folders = []
    for fingerprint in tokenizer.fingerprints():
        # Keys that did not exist yet are left out where they are not used: sets made before stay known.
        identity: list[Any] = [source.model_dump(exclude={"weight", *unused}), state, fingerprint]
        if tokenizer.begin_of_document is not None:
            identity.append(tokenizer.begin_of_document)  # earlier versions put nothing before a text
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        folders.append(Path(cache_dir).expanduser() / "prepared" / digest)
    return folders
