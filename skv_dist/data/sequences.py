"""Training and validation sequences of a prepared set, shuffled."""

import os

import numpy as np

from skv_dist.config.data import NEEDS_RESET, DataConfig
from skv_dist.data.example_packing import Fitted, PackedExamples, fit_examples
from skv_dist.data.mapped_tokens import MappedTokens
from skv_dist.data.order import shuffled
from skv_dist.data.packing import PackedDocuments, Sample, Windows
from skv_dist.data.split import SourceOrder
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError


class SequenceSet:
    """An endless, shuffled sequence of samples over some windows; a new order each epoch.

    Args:
        stream: seed and name of the shuffle.
    """

    def __init__(self, windows: Windows, indices: np.ndarray | None, stream: tuple[int, str]) -> None:
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
    prepared: MappedTokens,
    tokenizer: Tokenizer,
    config: DataConfig,
    order: SourceOrder,
    fraction: float,
    *,
    validation_needed: bool,
) -> tuple[SequenceSet, SequenceSet | None]:
    """Training and validation sequences of one set.

    Args:
        tokenizer: that made the set.
        fraction: share held out; 0 gives no validation set.
        validation_needed: whether a validation part that holds no sequence is an error; else it is None.

    Raises:
        UserError: a part holds no whole sequence, or the set holds examples and ``data.reset_attention`` is false.
    """

    def windows_of(documents: np.ndarray) -> Windows:
        if prepared.answers is None:
            return PackedDocuments(prepared, documents, config.sequence_length)
        fitted = fit_examples(prepared, documents, config, order.path)
        _report(fitted, config, order)
        return PackedExamples(prepared, fitted, config, tokenizer)

    if prepared.answers is not None and not config.reset_attention:
        raise UserError(f"data source '{order.path}' holds examples, which attend to themselves alone: {NEEDS_RESET}")
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


def _report(fitted: Fitted, config: DataConfig, order: SourceOrder) -> None:
    num_cut = int(fitted.is_cut.sum())
    if (num_cut or fitted.num_dropped) and os.environ.get("RANK", "0") == "0":
        total = len(fitted.chosen) + fitted.num_dropped
        print(
            f"data source '{order.path}': of {total:,} examples {num_cut:,} are longer than data.sequence_length "
            f"{config.sequence_length} and lost the beginning of their prompt; {fitted.num_dropped:,} were left out",
            flush=True,
        )


def _check_not_empty(sequences: SequenceSet, part: str, config: DataConfig, order: SourceOrder) -> None:
    if len(sequences) == 0:
        raise UserError(
            f"data source '{order.path}': its {part} holds no sequence of data.sequence_length "
            f"{config.sequence_length} (+1): lower data.sequence_length, add data or change data.validation_fraction"
        )
