"""Examples of a stream that wait for room in a sequence: whole ones are packed as they come, and none is cut in two."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from skv_dist.data.example_packing import first_kept
from skv_dist.data.packing import Sample
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError

NUM_WAITING = 8  # among which those are chosen that fill a sequence; a checkpoint holds so many a lane


class TokenExample(NamedTuple):
    """ids int64 [n], and answer bool [n]: the tokens that a model is to answer."""

    ids: np.ndarray
    answer: np.ndarray


class Fitting(NamedTuple):
    """What becomes of an example that is longer than a sequence.

    Attributes:
        sequence_length: ``data.sequence_length``.
        too_long: ``data.too_long``.
        only_answers: whether ``data.train_on`` is response.
    """

    sequence_length: int
    too_long: str
    only_answers: bool


class WaitingExamples:
    """Those that a lane has read and not yet used.

    Args:
        waiting: from a checkpoint.
        next_one: reads an example, and says where it stands.
        note: called with ``cut`` or ``left out`` for each example that is.
    """

    def __init__(
        self,
        waiting: list[TokenExample],
        next_one: Callable[[], tuple[TokenExample, object]],
        note: Callable[[str], None],
        tokenizer: Tokenizer,
        fitting: Fitting,
    ) -> None:
        self._next_one, self._note = next_one, note
        self._pad, self._first_of_cut = tokenizer.end_of_document, tokenizer.begin_of_document
        self._fitting, self._capacity = fitting, fitting.sequence_length + 1
        # Again, as a run may go on with shorter sequences.
        fitted = [self._fitted(example, "an example that waited in the checkpoint") for example in waiting]
        self.waiting = [example for example in fitted if example is not None]

    def take(self) -> Sample:
        """The next sample: the example that has waited longest, then always the longest that there is room for.

        Raises:
            UserError: an example is too long, and ``data.too_long`` is refuse.
        """
        self._fill_up()
        chosen = [self.waiting.pop(0)]
        room = self._capacity - len(chosen[0].ids)
        self._fill_up()
        while fitting := [number for number, one in enumerate(self.waiting) if len(one.ids) <= room]:
            chosen.append(self.waiting.pop(max(fitting, key=lambda number: (len(self.waiting[number].ids), -number))))
            room -= len(chosen[-1].ids)
            self._fill_up()
        tokens = np.full(self._capacity, self._pad, dtype=np.int64)
        counts = np.zeros(self._capacity, dtype=bool)
        documents = np.full(self._capacity, len(chosen), dtype=np.int64)  # of the padding
        begin = 0
        for number, example in enumerate(chosen):
            place = slice(begin, begin + len(example.ids))
            tokens[place], documents[place] = example.ids, number
            counts[place] = example.answer if self._fitting.only_answers else True
            begin = place.stop
        return Sample(tokens, documents, counts)

    def _fill_up(self) -> None:
        while len(self.waiting) < NUM_WAITING:
            example, place = self._next_one()
            fitted = self._fitted(example, str(place))
            if fitted is not None:
                self.waiting.append(fitted)

    def _fitted(self, example: TokenExample, place: str) -> TokenExample | None:
        """As much of it as a sequence holds; None where it is left out."""
        if len(example.ids) <= self._capacity:
            return example
        if self._fitting.too_long == "refuse":
            raise UserError(
                f"{place} has {len(example.ids)} tokens, more than data.sequence_length "
                f"{self._fitting.sequence_length} (+1): raise it, or set data.too_long to cut or drop"
            )
        begin = first_kept(example.answer, self._capacity)
        if self._fitting.too_long == "drop" or begin is None:
            self._note("left out")
            return None
        self._note("cut")
        ids = example.ids[begin:].copy()
        if self._first_of_cut is not None:
            ids[0] = self._first_of_cut
        return TokenExample(ids, example.answer[begin:])
