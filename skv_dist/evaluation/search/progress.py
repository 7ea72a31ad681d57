"""The maps that a search has measured, on disk as they come, so that one that was interrupted goes on."""

import json
from pathlib import Path
from typing import IO

import numpy as np

from skv_dist.errors import UserError
from skv_dist.evaluation.search.measured import Table

Sums = dict[Table, np.ndarray]


class Progress:
    """A file of one JSON object a line: first what was searched, then each map with its sums.

    Args:
        identity: of checkpoint, sequences and configuration. What is noted of others is not used, and written over.
        writes: whether this process keeps the file; one of all does.
    """

    def __init__(self, file: Path, identity: str, writes: bool) -> None:
        self.file, self._identity, self._writes = file, identity, writes
        self._stream: IO[str] | None = None

    def read(self) -> dict[str, Sums]:
        """Summed losses of each sequence by part of the search and map. A line that was cut off ends it."""
        found: dict[str, Sums] = {}
        try:
            first, *lines = self.file.read_text(encoding="utf-8").splitlines()
            if json.loads(first) != {"identity": self._identity}:
                return {}
            for line in lines:
                entry = json.loads(line)
                sums = np.asarray(entry["sums"], dtype=np.float64)
                found.setdefault(str(entry["part"]), {})[tuple(map(int, entry["map"]))] = sums
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return found

    def begin(self, known: dict[str, Sums]) -> None:
        """Keep what is known, and open the file for more.

        Raises:
            UserError: it cannot be written.
        """
        if not self._writes:
            return
        try:
            self._stream = self.file.open("w", encoding="utf-8")
            self._write({"identity": self._identity})
        except OSError as error:
            raise UserError(f"cannot write {self.file}: {error.strerror}") from error
        for part, tables in known.items():
            for table, sums in tables.items():
                self.note(part, table, sums)

    def note(self, part: str, table: Table, sums: np.ndarray) -> None:
        """Raises UserError where the file cannot be written."""
        if self._stream is None:
            return
        try:
            self._write({"part": part, "map": table, "sums": sums.tolist()})
        except OSError as error:
            raise UserError(f"cannot write {self.file}: {error.strerror}") from error

    def _write(self, entry: object) -> None:
        assert self._stream is not None
        self._stream.write(json.dumps(entry) + "\n")
        self._stream.flush()

    def end(self) -> None:
        """The search is over: what it found stands elsewhere."""
        if self._stream is not None:
            self._stream.close()
            self.file.unlink(missing_ok=True)
