"""Whole examples packed into sequences of fixed length: none is cut in two, and none sees another."""

import bisect
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from skv_dist.config.data import DataConfig
from skv_dist.data.mapped_tokens import MappedTokens
from skv_dist.data.packing import Sample
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError


@dataclass(frozen=True)
class Fitted:
    """Those of some examples that fit into a sequence, and what became of the others.

    Attributes:
        chosen: int64 [n], numbers of the examples that are used.
        begins: int64 [n], where each begins in the tokens of the set; behind its true beginning where it is cut.
        lengths: int64 [n], tokens of each, at most ``data.sequence_length`` + 1.
        is_cut: bool [n], which lost the beginning of their prompt.
        num_dropped: examples that are left out.
    """

    chosen: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    is_cut: np.ndarray
    num_dropped: int


def fit_examples(prepared: MappedTokens, chosen: np.ndarray, config: DataConfig, path: str) -> Fitted:
    """Make examples fit into ``data.sequence_length`` + 1 tokens, as ``data.too_long`` says.

    Args:
        chosen: numbers of the examples.
        path: of the source, for messages.

    Raises:
        UserError: one is longer, and ``data.too_long`` is refuse.
    """
    assert prepared.answers is not None
    capacity = config.sequence_length + 1
    begins, ends = prepared.offsets[chosen], prepared.offsets[chosen + 1]
    too_long = np.flatnonzero(ends - begins > capacity)
    if len(too_long) and config.too_long == "refuse":
        first = too_long[0]
        raise UserError(
            f"data source '{path}': {len(too_long)} of {len(chosen)} examples are longer than data.sequence_length "
            f"{config.sequence_length}, the first (number {chosen[first] + 1}) has {ends[first] - begins[first]} "
            "tokens: raise data.sequence_length, or set data.too_long to cut or drop"
        )
    fits = np.ones(len(chosen), dtype=bool)
    for index in too_long:
        kept = first_kept(prepared.answers[begins[index] : ends[index]], capacity)
        fits[index] = config.too_long == "cut" and kept is not None
        begins[index] = int(ends[index]) - capacity
    is_cut = np.zeros(len(chosen), dtype=bool)
    is_cut[too_long] = True
    return Fitted(chosen[fits], begins[fits], (ends - begins)[fits], is_cut[fits], int((~fits).sum()))


def first_kept(answer: np.ndarray, capacity: int) -> int | None:
    """Where an example that is longer than ``capacity`` begins once it is cut from the left.

    What is left must hold the whole last answer: half an answer would teach nonsense. None where it does not.

    Args:
        answer: bool [n], the tokens that a model is to answer.
    """
    begin = len(answer) - capacity
    answered = np.flatnonzero(answer)
    first_of_last = int(answered[-1]) - _run_length(answered) + 1 if len(answered) else -1
    return begin if first_of_last > begin else None


def _run_length(places: np.ndarray) -> int:
    """How many of the last ``places`` (ascending) follow one another without a gap."""
    gaps = np.flatnonzero(np.diff(places) != 1)
    return len(places) - (int(gaps[-1]) + 1 if len(gaps) else 0)


class PackedExamples:
    """Examples of a prepared set, several whole ones in a sequence; what is left over is padding that never counts.

    Which ones share a sequence follows from their lengths alone (best fit, the longest first), so it is the same for
    every seed and layout; each epoch shuffles the sequences. A prompt that was cut begins with the token with which
    the tokenizer begins a text, if it has one.
    """

    def __init__(self, prepared: MappedTokens, fitted: Fitted, config: DataConfig, tokenizer: Tokenizer) -> None:
        assert prepared.answers is not None
        self._prepared, self._answers, self._fitted = prepared, prepared.answers, fitted
        self._pad, self._first_of_cut = tokenizer.end_of_document, tokenizer.begin_of_document
        self._capacity = config.sequence_length + 1
        self._only_answers = config.train_on == "response"
        self._bins = pack(fitted.lengths, self._capacity)

    @property
    def num_tokens(self) -> int:
        return int(self._fitted.lengths.sum())

    def __len__(self) -> int:
        return len(self._bins)

    def __getitem__(self, index: int) -> Sample:
        tokens = np.full(self._capacity, self._pad, dtype=np.int64)
        counts = np.zeros(self._capacity, dtype=bool)
        documents = np.full(self._capacity, len(self._bins[index]), dtype=np.int64)  # of the padding
        begin = 0
        for document, example in enumerate(self._bins[index]):
            length = int(self._fitted.lengths[example])
            first = int(self._fitted.begins[example])
            place, stored = slice(begin, begin + length), slice(first, first + length)
            tokens[place] = self._prepared.read(stored.start, stored.stop)
            if self._fitted.is_cut[example] and self._first_of_cut is not None:
                tokens[begin] = self._first_of_cut
            documents[place] = document
            counts[place] = self._answers[stored] if self._only_answers else True
            begin += length
        return Sample(tokens, documents, counts)


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Numbers of the items in each bin, none fuller than ``capacity``: best fit, the longest first.

    Args:
        lengths: int [n], each at most ``capacity``.

    Best-fit decreasing needs at most 11/9 of the fewest bins, and one (Johnson 1973).
    """
    bins: list[list[int]] = []
    by_room: defaultdict[int, list[int]] = defaultdict(list)  # room left -> bins, the latest last
    rooms: list[int] = []  # those that some bin has, ascending
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(place)
        bins[chosen].append(item)
        left = room - length
        if left and not by_room[left]:
            bisect.insort(rooms, left)
        if left:
            by_room[left].append(chosen)
    return [np.array(items, dtype=np.int64) for items in bins]
