"""Documents packed into sequences of fixed length, with the document boundaries kept."""

from typing import NamedTuple

import numpy as np

from skv_dist.config.data import DataConfig
from skv_dist.data.order import shuffled
from skv_dist.data.split import SourceOrder
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
    """An endless, shuffled sequence of samples over some windows; a new order each epoch.

    Args:
        stream: seed and name of the shuffle.
    """

    def __init__(self, windows: PackedDocuments, indices: np.ndarray | None, stream: tuple[int, str]) -> None:
        self._windows = windows
        self._indices = indices
        self._seed, self._stream = stream

    def __len__(self) -> int:
        return len(self._windows) if self._indices is None else len(self._indices)

    def __getitem__(self, position: int) -> Sample:
        epoch, within = divmod(position, len(self))
        index = shuffled(within, len(self), self._seed, self._stream, epoch)
        return self._windows[index if self._indices is None else int(self._indices[index])]


def split_prepared(
    prepared: PreparedSet, config: DataConfig, order: SourceOrder, fraction: float, *, validation_needed: bool
) -> tuple[SequenceSet, SequenceSet | None]:
    """Training and validation sequences of one set.

    Args:
        fraction: share held out; 0 gives no validation set.
        validation_needed: whether a validation part that holds no sequence is an error; else it is None.

    Raises:
        UserError: a part holds no whole sequence.
    """

    def windows_of(documents: np.ndarray) -> PackedDocuments:
        return PackedDocuments(prepared, documents, config.sequence_length)

    all_windows = windows_of(np.arange(prepared.num_documents))
    if fraction == 0:
        train = SequenceSet(all_windows, None, order.train_stream())
        _check_not_empty(train, "training part", config, order)
        return train, None
    if config.validation_split == "sequence":
        held_out = order.held_out_windows(len(all_windows), fraction)
        train = SequenceSet(all_windows, np.flatnonzero(~held_out), order.train_stream())
        validation = SequenceSet(all_windows, np.flatnonzero(held_out), order.validation_stream())
    else:
        held_out = order.held_out_documents(prepared, fraction)
        train = SequenceSet(windows_of(np.flatnonzero(~held_out)), None, order.train_stream())
        validation = SequenceSet(windows_of(np.flatnonzero(held_out)), None, order.validation_stream())
    num_held_out = int(held_out.sum())

    def described(part: str, size: int) -> str:
        return f"{part} ({size} of {len(held_out)} {config.validation_split}s)"

    _check_not_empty(train, described("training part", len(held_out) - num_held_out), config, order)
    if len(validation) == 0 and not validation_needed:
        return train, None
    _check_not_empty(validation, described("validation part", num_held_out), config, order)
    return train, validation


def _check_not_empty(sequences: SequenceSet, part: str, config: DataConfig, order: SourceOrder) -> None:
    if len(sequences) == 0:
        raise UserError(
            f"data source '{order.path}': its {part} holds no sequence of data.sequence_length "
            f"{config.sequence_length} (+1): lower data.sequence_length, add data or change data.validation_fraction"
        )
