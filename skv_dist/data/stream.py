"""Streaming: raw documents tokenized and packed on the fly, in one sequence that every replica walks alike.

Each process reads the whole stream and keeps its own samples. That costs tokenizing once per process, and buys an
order that does not depend on the number of replicas. For large runs, prepare the data instead.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.data.examples import encode_document, text_hash
from skv_dist.data.local_files import local_files
from skv_dist.data.order import blended, shuffled
from skv_dist.data.packing import Sample
from skv_dist.data.skipped import Skipped
from skv_dist.data.sources import documents
from skv_dist.data.split import is_held_out
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError


def _endless_documents(
    source: SourceConfig, config: DataConfig, seed: int, keep: Callable[[str], bool]
) -> Iterator[str]:
    """Documents for which ``keep(text)``, over and over; shuffled anew within a buffer each epoch."""
    epoch = 0
    while True:
        skipped = Skipped(source.path, config.max_skipped, streaming=True)
        num_kept = 0
        for text in _in_buffer(_one_epoch(source, config, seed, epoch, skipped), config.shuffle_buffer, seed, epoch):
            if keep(text):
                num_kept += 1
                yield text
        report = skipped.finish()
        if report and epoch == 0 and os.environ.get("RANK", "0") == "0":
            print(report, flush=True)
        if not num_kept:
            raise UserError(
                f"data source '{source.path}': an epoch has no document for this part: "
                "check its content and data.validation_fraction"
            )
        epoch += 1


def _one_epoch(source: SourceConfig, config: DataConfig, seed: int, epoch: int, skipped: Skipped) -> Iterator[Any]:
    """All texts once; files in a new order each epoch, unless documents keep their order."""
    order = (seed, epoch) if config.shuffle_buffer else None
    if source.format == "hub":
        return documents(source, skipped, cache_dir=config.cache_dir, streaming=True, order=order)
    files = local_files(source)
    if order is not None:
        files = [files[shuffled(i, len(files), seed, "files", epoch)] for i in range(len(files))]
    return documents(source, skipped, files=files)


def _in_buffer(texts: Iterator[str], size: int, seed: int, epoch: int) -> Iterator[str]:
    """The texts, each drawn among ``size`` that wait."""
    if size == 0:
        yield from texts
        return
    waiting: list[str] = []
    for number, text in enumerate(texts):
        if len(waiting) < size:
            waiting.append(text)
            continue
        block, within = divmod(number, size)
        place = shuffled(within, size, seed, f"buffer/{block}", epoch)
        yield waiting[place]
        waiting[place] = text
    for place in range(len(waiting)):
        yield waiting[shuffled(place, len(waiting), seed, "buffer/end", epoch)]


def _packed(texts: Iterator[str], tokenizer: Tokenizer, length: int) -> Iterator[Sample]:
    tokens = np.empty(0, dtype=np.int64)
    labels = np.empty(0, dtype=np.int64)
    for number, text in enumerate(texts):
        ids = encode_document(tokenizer, text).ids
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

    Attributes:
        contents: empty: nobody has read the stream to its end.
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
        self.contents: list[str] = []
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
        def keep(text: str) -> bool:
            if fraction == 0:
                return not validation
            hashes = np.array([text_hash(text)], dtype=np.uint64)
            return bool(is_held_out(hashes, fraction, config.split_seed)[0]) == validation

        def make() -> Iterator[Sample]:
            return _packed(_endless_documents(source, config, seed, keep), tokenizer, config.sequence_length)

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
