"""Documents packed into sequences of fixed length, with the document boundaries kept."""

from typing import NamedTuple

import numpy as np

from skv_dist.config.data import DataConfig
from skv_dist.data.order import held_out, shuffled
from skv_dist.data.token_set import PreparedSet
from skv_dist.errors import UserError

_VALIDATION = "/validation"  # ends the name by which a validation part is shuffled


class Sample(NamedTuple):
    """One sequence and the token after it.

    Attributes:
        tokens: int64 [s + 1].
        documents: int64 [s + 1], counting the documents within this sample from 0.
    """

    tokens: np.ndarray
    documents: np.ndarray


class PackedDocuments:
    """Some documents of a prepared set, laid end to end and cut into windows of ``sequence_length``.

    Window i holds tokens [i * s, i * s + s + 1): consecutive windows share one token, so that every token but the
    very first is predicted exactly once an epoch.
    """

    def __init__(self, prepared: PreparedSet, chosen: np.ndarray, sequence_length: int) -> None:
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
            pieces.append(np.asarray(self._prepared.tokens[begin + offset : stop + offset], dtype=np.int64))
            labels.append(np.full(stop - begin, place - first, dtype=np.int64))
            begin, place = stop, place + 1
        return Sample(np.concatenate(pieces), np.concatenate(labels))


class SequenceSet:
    """An endless, shuffled sequence of samples over some windows; a new order each epoch."""

    def __init__(self, windows: PackedDocuments, indices: np.ndarray | None, seed: int, stream: str) -> None:
        self._windows = windows
        self._indices = indices
        self._seed = seed
        self._stream = stream

    def __len__(self) -> int:
        return len(self._windows) if self._indices is None else len(self._indices)

    def __getitem__(self, position: int) -> Sample:
        epoch, within = divmod(position, len(self))
        index = shuffled(within, len(self), self._seed, self._stream, epoch)
        return self._windows[index if self._indices is None else int(self._indices[index])]


def split_prepared(
    prepared: PreparedSet, config: DataConfig, seed: int, stream: str, fraction: float
) -> tuple[SequenceSet, SequenceSet | None]:
    """Training and validation sequences of one set.

    Args:
        stream: names the source, so that two sources are shuffled independently.
        fraction: share held out; 0 gives no validation set.

    Raises:
        UserError: a part holds no whole sequence.
    """
    all_documents = np.arange(prepared.num_documents)
    if config.validation_split == "sequence" or fraction == 0:
        windows = PackedDocuments(prepared, all_documents, config.sequence_length)
        is_held_out = _drawn(len(windows), fraction, seed, stream)
        _check_not_empty(int((~is_held_out).sum()), "training part", windows, config, stream)
        train = SequenceSet(windows, np.flatnonzero(~is_held_out) if is_held_out.any() else None, seed, stream)
        if fraction == 0:
            return train, None
        _check_not_empty(int(is_held_out.sum()), "validation part", windows, config, stream)
        return train, SequenceSet(windows, np.flatnonzero(is_held_out), seed, stream + _VALIDATION)

    def documents(chosen: np.ndarray, part: str, name: str) -> SequenceSet:
        windows = PackedDocuments(prepared, chosen, config.sequence_length)
        described = f"{part} ({len(chosen)} of {len(all_documents)} documents)"
        _check_not_empty(len(windows), described, windows, config, stream)
        return SequenceSet(windows, None, seed, name)

    is_held_out = _drawn(len(all_documents), fraction, seed, stream)
    return (
        documents(all_documents[~is_held_out], "training part", stream),
        documents(all_documents[is_held_out], "validation part", stream + _VALIDATION),
    )


def _drawn(size: int, fraction: float, seed: int, stream: str) -> np.ndarray:
    """bool [size]: which documents or windows are held out."""
    return np.fromiter((held_out(index, fraction, seed, stream) for index in range(size)), dtype=bool)


def _check_not_empty(num_sequences: int, part: str, windows: PackedDocuments, config: DataConfig, stream: str) -> None:
    if num_sequences == 0:
        raise UserError(
            f"data source '{stream}': its {part} of {windows.num_tokens} tokens holds no sequence of "
            f"data.sequence_length {config.sequence_length} (+1): lower data.sequence_length, add data or change "
            "data.validation_fraction"
        )
