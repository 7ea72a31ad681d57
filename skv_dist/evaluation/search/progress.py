"""The maps that a search has measured, on disk as they come, so that one that was interrupted goes on."""

import json
from pathlib import Path
from typing import IO, Any

import numpy as np

from skv_dist.errors import UserError
from skv_dist.evaluation.search.measured import Table
from skv_dist.files import replace_text

Sums = dict[Table, np.ndarray]


class Progress:
    """A file of one JSON object a line: first what was searched, then each map with its sums as they come.

    Args:
        identity: of checkpoint, sequences and configuration. What is noted of others is not used, and written over.
    """

    def __init__(self, file: Path, identity: str) -> None:
        self.file, self._identity = file, identity
        self._stream: IO[str] | None = None

    def read(self) -> dict[str, Sums]:
        """Summed losses of each sequence by stage of the search and map. A line that was cut off ends it."""
        found: dict[str, Sums] = {}
        try:
            first, *lines = self.file.read_text(encoding="utf-8").splitlines()
            if json.loads(first) != {"identity": self._identity}:
                return {}
            for line in lines:
                entry = json.loads(line)
                sums = np.asarray(entry["sums"], dtype=np.float64)
                known, table = found.setdefault(str(entry["stage"]), {}), tuple(map(int, entry["map"]))
                known[table] = np.concatenate([known.get(table, ()), sums])
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return found

    def begin(self) -> dict[str, Sums]:
        """Keep what is known, open the file for more, and return what `read` does. On one process of all.

        Raises:
            UserError: it cannot be written.
        """
        known = self.read()
        entries = [_entry(stage, table, sums) for stage, tables in known.items() for table, sums in tables.items()]
        try:
            replace_text(
                self.file, "".join(json.dumps(entry) + "\n" for entry in [{"identity": self._identity}, *entries])
            )
            self._stream = self.file.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {self.file}: {error.strerror}") from error
        return known

    def note(self, stage: str, table: Table, sums: np.ndarray) -> None:
        """The losses of some sequences of a map, those behind the ones that were noted before. Where the file cannot be
        written any more, this says so once, and the search goes on without.
        """
        if self._stream is None:
            return
        try:
            self._stream.write(json.dumps(_entry(stage, table, sums)) + "\n")
            self._stream.flush()
        except OSError as error:
            self._stream = None
            print(f"{self.file} cannot be written: {error.strerror}; going on without", flush=True)

    def end(self) -> None:
        """The search is over: what it found stands elsewhere."""
        if self._stream is not None:
            self._stream.close()
            self.file.unlink(missing_ok=True)


def _entry(stage: str, table: Table, sums: np.ndarray) -> dict[str, Any]:
    return {"stage": stage, "map": table, "sums": sums.tolist()}
