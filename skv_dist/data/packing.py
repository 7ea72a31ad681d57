"""Documents packed into sequences of fixed length, with the document boundaries kept."""

from typing import NamedTuple, Protocol

import numpy as np

from skv_dist.data.mapped_tokens import MappedTokens


class Sample(NamedTuple):
    """One sequence and the token after it.

    Attributes:
        tokens: int64 [s + 1].
        documents: int64 [s + 1], counting the documents within this sample from 0.
        counts: bool [s + 1], the tokens whose prediction counts; None: all of them.
        source: number of the data source that all of it comes from, among those of its blend.
    """

    tokens: np.ndarray
    documents: np.ndarray
    counts: np.ndarray | None = None
    source: int = 0


class Windows(Protocol):
    """Sequences of ``data.sequence_length`` that one set is cut or packed into.

    Attributes:
        num_tokens: that they hold.
    """

    @property
    def num_tokens(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class PackedDocuments:
    """Some documents of a prepared set, laid end to end and cut into windows of ``sequence_length``.

    Window i holds tokens [i * s, i * s + s + 1): consecutive windows share one token, so that every token but the
    very first is predicted exactly once an epoch.
    """

    def __init__(self, prepared: MappedTokens, chosen: np.ndarray, sequence_length: int) -> None:
        self._prepared = prepared
        self._chosen = chosen
        self._starts = np.concatenate([[0], np.cumsum(np.diff(prepared.offsets)[chosen])])
        self._length = sequence_length

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    def __len__(self) -> int:
        return max(0, (self.num_tokens - 1) // self._length)

    def __getitem__(self, index: int) -> Sample:
        begin, end = index * self._length, (index + 1) * self._length + 1
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        pieces, labels = [], []
        place = first
        while begin < end:
            stop = min(end, int(self._starts[place + 1]))
            offset = int(self._prepared.offsets[self._chosen[place]]) - int(self._starts[place])
            pieces.append(self._prepared.read(begin + offset, stop + offset))
            labels.append(np.full(stop - begin, place - first, dtype=np.int64))
            begin, place = stop, place + 1
        return Sample(np.concatenate(pieces), np.concatenate(labels))
