"""Documents of a source that hold no text: counted, reported, and too many of them refused."""

from collections import Counter
from collections.abc import Mapping

from skv_dist.errors import UserError

_HOPELESS_FROM = 1000  # rows: where most of so many hold no text, nobody needs to wait for the end
_CHECKED_FROM = 10_000  # rows of a stream, whose end may never come
_ALWAYS_ALLOWED = 10


class Skipped:
    """Counts the documents of one source.

    Args:
        source: its path, for messages.
        limit: ``data.max_skipped``.
        streaming: whether the limit holds before the end too.
    """

    def __init__(self, source: str, limit: float, *, streaming: bool = False) -> None:
        self._source, self._limit, self._streaming = source, limit, streaming
        self._reasons: Counter[str] = Counter()
        self._first = ""
        self._empty_files: list[str] = []
        self._replaced_files: list[str] = []
        self.num_rows = 0  # all that were read

    @property
    def num_skipped(self) -> int:
        return sum(self._reasons.values())

    def add(self, num_rows: int, reasons: Mapping[str, int]) -> None:
        """Take over what an earlier part of the run has counted."""
        self.num_rows += num_rows
        self._reasons.update(reasons)
        if reasons:
            self._first = self._first or "before the run was resumed"

    def skip(self, reason: str, place: object) -> None:
        """Count a document that holds no text.

        Args:
            place: of the document; it is put into words where it is the first.

        Raises:
            UserError: there are too many of them.
        """
        self._reasons[reason] += 1
        self._first = self._first or str(place)
        hopeless = self.num_rows >= _HOPELESS_FROM and self.num_skipped > self.num_rows / 2
        if hopeless or (self._streaming and self.num_rows >= _CHECKED_FROM):
            self._check()

    def note_empty_file(self, file: str) -> None:
        self._empty_files.append(file)

    def note_replaced(self, file: str) -> None:
        """Count a file that holds bytes which are no UTF-8 and became U+FFFD."""
        self._replaced_files.append(file)

    def finish(self) -> str | None:
        """At the end of the source: what was skipped, in one sentence, or None.

        Raises:
            UserError: nothing is left, or there was too little.
        """
        if self.num_rows == self.num_skipped:
            raise UserError(f"data source '{self._source}' holds no text: {self._described() or 'it is empty'}")
        return self.report()

    def report(self) -> str | None:
        """What was skipped so far, in one sentence, or None.

        Raises:
            UserError: it is too much.
        """
        self._check()
        described = self._described()
        return f"data source '{self._source}': {described}" if described else None

    def _check(self) -> None:
        allowed = max(_ALWAYS_ALLOWED, self._limit * self.num_rows) if self._limit else 0
        if self.num_skipped > allowed:
            raise UserError(
                f"data source '{self._source}': {self._described()}, which is more than data.max_skipped "
                f"{self._limit} lets pass: mend the source, or raise the limit (skv-data: --max-skipped)"
            )

    def _described(self) -> str:
        parts = []
        if self.num_skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self._reasons.items()))
            parts.append(f"{self.num_skipped} of {self.num_rows} documents skipped: {reasons}; first {self._first}")
        for files, predicate in (
            (self._empty_files, "empty"),
            (self._replaced_files, "not all UTF-8, and U+FFFD stands for what is not"),
        ):
            if files:
                others = f" and {len(files) - 1} more are " if files[1:] else " is "
                parts.append(files[0] + others + predicate)
        return "; ".join(parts)
