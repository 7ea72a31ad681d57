"""Streaming: raw documents tokenized and packed on the fly, in one sequence that every replica walks alike.

Each process reads the whole stream and keeps its own samples. That costs tokenizing once per process, and buys an
order that does not depend on the number of replicas. For large runs, prepare the data instead.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.data.order import blended, held_out
from skv_dist.data.packing import Sample
from skv_dist.data.sources import documents, open_source
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError


def _endless_documents(
    source: SourceConfig, config: DataConfig, seed: int, keep: Callable[[int], bool], cache_dir: str
) -> Iterator[str]:
    """Documents for which ``keep(index)``, over and over; shuffled anew within a buffer each epoch."""
    epoch = 0
    while True:
        rows: Any = open_source(source, streaming=True, cache_dir=cache_dir)
        rows = rows.map(_number_rows, with_indices=True)
        if config.shuffle_buffer:
            rows = rows.shuffle(seed=seed + epoch, buffer_size=config.shuffle_buffer)
        any_kept = False
        numbered = _Numbered(rows)
        for text in documents(source, numbered):
            if text and keep(numbered.index):
                any_kept = True
                yield text
        if not any_kept:
            raise UserError(
                f"data source '{source.path}': an epoch has no document for this part: "
                "check its content and data.validation_fraction"
            )
        epoch += 1


def _number_rows(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {**row, "__index__": index}


class _Numbered:
    """Rows, remembering the number that the last one had before shuffling."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.index = -1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            self.index = row["__index__"]
            yield row


def _packed(texts: Iterator[str], tokenizer: Tokenizer, length: int) -> Iterator[Sample]:
    tokens = np.empty(0, dtype=np.int64)
    labels = np.empty(0, dtype=np.int64)
    for number, text in enumerate(texts):
        ids = np.append(tokenizer.encode(text), tokenizer.end_of_document)
        tokens = np.concatenate([tokens, ids])
        labels = np.concatenate([labels, np.full(len(ids), number, dtype=np.int64)])
        begin = 0
        while len(tokens) - begin > length:
            window = slice(begin, begin + length + 1)
            yield Sample(tokens[window], labels[window] - labels[begin])
            begin += length
        tokens, labels = tokens[begin:], labels[begin:]


class StreamingSet:
    """Samples by position, reading forward; a position may be asked for again only while nothing later was.

    Args:
        validation: take the held-out documents of the sources instead of the others.
        fraction: share of documents held out.
    """

    def __init__(
        self,
        sources: list[SourceConfig],
        config: DataConfig,
        tokenizer: Tokenizer,
        seed: int,
        *,
        validation: bool,
        fraction: float,
    ) -> None:
        self._weights = [source.weight for source in sources]
        self._seed = seed
        self._make = [self._maker(source, config, tokenizer, seed, validation, fraction) for source in sources]
        self._streams: list[Iterator[Sample]] = []
        self._next = 0
        self._last: Sample | None = None

    @staticmethod
    def _maker(
        source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, seed: int, validation: bool, fraction: float
    ) -> Callable[[], Iterator[Sample]]:
        def keep(index: int) -> bool:
            return held_out(index, fraction, seed, source.path) == validation

        def make() -> Iterator[Sample]:
            texts = _endless_documents(source, config, seed, keep, config.cache_dir)
            return _packed(texts, tokenizer, config.sequence_length)

        return make

    def __getitem__(self, position: int) -> Sample:
        if self._last is not None and position == self._next - 1:
            return self._last
        if not self._streams or position < self._next:
            self._streams = [make() for make in self._make]  # from the start: the only way back in a stream
            self._next = 0
        while self._next <= position:
            source, _ = blended(self._next, self._weights, self._seed)
            self._last = next(self._streams[source])
            self._next += 1
        assert self._last is not None
        return self._last
