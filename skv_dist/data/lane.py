"""One lane of a streamed source: documents drawn among a few, packed, with a state from which it goes on.

A lane takes its documents in *blocks*: so many are read, and come in a random order. So its place in the text is where
the block began and how many of it were taken. On a resume the texts of one block are read again, none is tokenized
again: what is left of the document that was cut last is kept as tokens, and so are examples that wait for room.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from skv_dist.data.examples import Document, document_hash, encode_document
from skv_dist.data.lane_state import NO_ANSWERS, NO_TOKENS, LaneState
from skv_dist.data.order import shuffled
from skv_dist.data.packing import Sample
from skv_dist.data.read_part import Part, PlacedRow
from skv_dist.data.row_documents import DocumentOfRow, NoDocumentError
from skv_dist.data.skipped import Skipped
from skv_dist.data.split import is_held_out
from skv_dist.data.stream_files import Shares, StreamFiles
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.data.waiting_examples import Fitting, TokenExample, WaitingExamples
from skv_dist.errors import UserError


@dataclass(frozen=True)
class LaneSettings:
    """What all lanes of a source have in common.

    Attributes:
        path: of the source, for messages.
        seed: of the order of files and documents.
        block: documents among which the next one is drawn; 0: files and documents come in their order.
        held_out: whether the documents that are held out are taken, or the others; None: all.
        fraction: part of the documents that is held out.
    """

    path: str
    lanes: int
    seed: int
    block: int
    fitting: Fitting
    held_out: bool | None
    fraction: float
    split_seed: int


@dataclass(frozen=True)
class _Place:
    file: str
    number: object

    def __str__(self) -> str:
        return f"{self.file} row {self.number}"


class _Found(NamedTuple):
    document: Document
    place: _Place


class RowCount:
    """Rows that one lane has read, and how many of them held no text, by the reason."""

    def __init__(self, state: LaneState) -> None:
        self.num_rows, self.skipped = state.num_rows, Counter(dict(state.skipped))


class LaneReader:
    """The documents of one source for the lanes of this process."""

    def __init__(
        self,
        files: StreamFiles,
        of_row: DocumentOfRow,
        tokenizer: Tokenizer,
        skipped: Skipped,
        settings: LaneSettings,
        note_epoch: Callable[[int, int], None],
        *,
        holds_examples: bool,
    ) -> None:
        self.holds_examples = holds_examples
        self.settings, self.tokenizer, self.skipped = settings, tokenizer, skipped
        self._files, self._of_row, self.note_epoch = files, of_row, note_epoch
        self._shares: dict[int, Shares] = {}
        self._found = False  # a document that is wanted
        self.too_long: Counter[str] = Counter()  # examples, by what became of them

    def parts(self, epoch: int, lane: int) -> list[Part]:
        if epoch not in self._shares:
            self._shares = {old: shares for old, shares in self._shares.items() if abs(old - epoch) < 2}
            seed = self.settings.seed if self.settings.block else None
            self._shares[epoch] = self._files.shares(epoch, self.settings.lanes, seed)
        return self._shares[epoch].parts(lane)

    def check_not_empty(self) -> None:
        """Where a lane found nothing in its share of an epoch: whether there is anything for any lane.

        Raises:
            UserError: there is not.
        """
        if self._found:
            return
        for part in self._files.shares(0, 1, None).parts(0):
            if next(self.documents(part, None, RowCount(LaneState())), None) is not None:
                return
        raise UserError(
            f"data source '{self.settings.path}': an epoch has no document for this part: "
            "check its content and data.validation_fraction"
        )

    def too_long_report(self) -> str | None:
        """What became of examples that were too long, in one sentence; None where none was."""
        if not self.too_long:
            return None
        cut, left_out = self.too_long["cut"], self.too_long["left out"]
        return (
            f"data source '{self.settings.path}': of the examples read so far {cut:,} are longer than "
            f"data.sequence_length {self.settings.fitting.sequence_length} and lost the beginning of their prompt; "
            f"{left_out:,} were left out"
        )

    def documents(self, part: Part, cursor: int | None, count: RowCount) -> Iterator[tuple[int, _Found]]:
        """(cursor behind it, what was found) of the documents that are wanted.

        Raises:
            UserError: a row cannot be read, or too many hold no text.
        """
        num_rows = num_missing = 0
        for row in self._files.rows(part, cursor):
            num_rows += 1
            document, is_missing = self._document_of(row, part, count)
            num_missing += is_missing
            if document is not None and self._wanted(document):
                self._found = True
                yield row.cursor, _Found(document, _Place(part.file, row.number))
        if cursor is None and num_rows == 0 and part.is_whole:
            self.skipped.note_empty_file(part.file)
        elif part.is_whole and cursor is None and num_rows and num_missing == num_rows:
            named = " or ".join(f"'{name}'" for name in self._of_row.fields)
            raise UserError(
                f"data source '{part.file}': no row has a field {named}: set {self._of_row.keys}, or leave the file out"
            )

    def _document_of(self, row: PlacedRow, part: Part, count: RowCount) -> tuple[Document | None, bool]:
        """The document of a row, if it has one, and whether the field is missing."""
        count.num_rows += 1
        self.skipped.num_rows += 1
        try:
            document = self._of_row(row.fields, f"{part.file}' row {row.number}")
        except NoDocumentError as none:
            count.skipped[none.reason] += 1
            self.skipped.skip(none.reason, _Place(part.file, row.number))
            return None, none.is_missing
        except UserError as error:
            raise UserError(f"data source '{part.file}': row {row.number}: {error}") from error
        if self._files.are_texts and isinstance(document, str) and "\ufffd" in document:
            self.skipped.note_replaced(part.file)
        return document, False

    def _wanted(self, document: Document) -> bool:
        settings = self.settings
        if settings.held_out is None:
            return True
        hashes = np.array([document_hash(document)], dtype=np.uint64)
        return bool(is_held_out(hashes, settings.fraction, settings.split_seed)[0]) == settings.held_out


class Lane:
    """An endless sequence of samples.

    Args:
        number: of the lane.
        state: where it goes on.
    """

    def __init__(self, reader: LaneReader, number: int, state: LaneState) -> None:
        self._reader, self._number = reader, number
        reader.skipped.add(state.num_rows, dict(state.skipped))
        self._count = RowCount(state)
        self._at = self._behind = replace(state.without_tokens, taken=0)  # begin and end of the block
        self._taken, self._remaining = state.taken, state.remaining
        self._waiting: list[_Found] | None = None  # the block, in the order in which it comes
        self._rows: Iterator[tuple[int, _Found]] | None = None
        self._left_out_since: int | None = None  # the epoch in which an example of the next sample was left out first
        self._examples: WaitingExamples | None = None
        if reader.holds_examples:
            ends = np.cumsum(state.lengths, dtype=np.int64)[:-1]
            parts = zip(np.split(state.remaining, ends), np.split(state.answers, ends)) if state.lengths else ()
            waiting = [TokenExample(ids, answer) for ids, answer in parts]
            fitting = reader.settings.fitting
            self._examples = WaitingExamples(waiting, self._next_example, self._note_long, reader.tokenizer, fitting)

    @property
    def state(self) -> LaneState:
        """Behind the samples that were taken."""
        is_behind = self._waiting is not None and self._taken >= len(self._waiting)  # it need not be read again
        place = replace(self._behind, taken=0) if is_behind else replace(self._at, taken=self._taken)
        if self._examples is None:
            return replace(place, remaining=self._remaining)
        waiting = self._examples.waiting
        return replace(
            place,
            remaining=np.concatenate([NO_TOKENS, *(example.ids for example in waiting)]),
            lengths=tuple(len(example.ids) for example in waiting),
            answers=np.concatenate([NO_ANSWERS, *(example.answer for example in waiting)]),
        )

    def take(self) -> Sample:
        """The next sample.

        Raises:
            UserError: the text cannot be read, or has nothing that is wanted.
        """
        if self._examples is not None:
            self._left_out_since = None
            return self._examples.take()
        length = self._reader.settings.fitting.sequence_length
        pieces, num_tokens = [self._remaining], len(self._remaining)
        while num_tokens <= length:
            pieces.append(encode_document(self._reader.tokenizer, self._next().document).ids.astype(np.int64))
            num_tokens += len(pieces[-1])
        pieces = [piece for piece in pieces if len(piece)]
        tokens = np.concatenate(pieces)
        documents = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        self._remaining = tokens[length:].copy()  # all of the last document, as those before were not enough
        return Sample(tokens[: length + 1], documents[: length + 1])

    def _next_example(self) -> tuple[TokenExample, object]:
        found = self._next()
        tokens = encode_document(self._reader.tokenizer, found.document)
        assert tokens.answer is not None
        return TokenExample(
            tokens.ids.astype(np.int64), tokens.answer
        ), f"data source '{found.place.file}': row {found.place.number}"

    def _note_long(self, what: str) -> None:
        self._reader.too_long[what] += 1
        if self._left_out_since is None:
            self._left_out_since = self._at.epoch
        if self._at.epoch > self._left_out_since + 1:
            raise UserError(
                f"data source '{self._reader.settings.path}': all of its examples are longer than data.sequence_length "
                f"{self._reader.settings.fitting.sequence_length}: raise it"
            )

    def _next(self) -> _Found:
        while self._waiting is None or self._taken >= len(self._waiting):
            if self._waiting is not None:
                self._at, self._taken = self._behind, 0
            self._waiting = self._next_block()
        self._taken += 1
        return self._waiting[self._taken - 1]

    def _next_block(self) -> list[_Found]:
        """The documents of a block, in a random order. It ends with the epoch at the latest."""
        size = max(1, self._reader.settings.block)
        block: list[_Found] = []
        while len(block) < size:
            parts = self._reader.parts(self._behind.epoch, self._number)
            if self._behind.part < len(parts):
                if (found := self._from_part(parts[self._behind.part])) is not None:
                    block.append(found)
                continue
            self._move(epoch=self._behind.epoch + 1, part=0)
            self._reader.note_epoch(self._number, self._behind.epoch)
            if block:
                break
            self._reader.check_not_empty()
            self._at = self._behind
        if self._reader.settings.block == 0:
            return block
        stream = f"lane/{self._number}/{self._at.part}/{self._at.cursor}"
        seed, epoch = self._reader.settings.seed, self._at.epoch
        return [block[shuffled(i, len(block), seed, stream, epoch)] for i in range(len(block))]

    def _from_part(self, part: Part) -> _Found | None:
        """The next document of a part; None at its end."""
        if self._rows is None:
            self._rows = self._reader.documents(part, self._behind.cursor, self._count)
        for cursor, found in self._rows:
            self._move(cursor=cursor)
            return found
        self._move(part=self._behind.part + 1)
        return None

    def _move(self, *, epoch: int | None = None, part: int | None = None, cursor: int | None = None) -> None:
        if cursor is None:
            self._rows = None
        self._behind = LaneState(
            epoch=self._behind.epoch if epoch is None else epoch,
            part=self._behind.part if part is None else part,
            cursor=cursor,
            num_rows=self._count.num_rows,
            skipped=tuple(sorted(self._count.skipped.items())),
        )
