"""Lines that say how far a long conversion is."""

import sys
import time

_SECONDS = 10.0


class Progress:
    """Prints a line every ten seconds; nothing for what is done before.

    Args:
        what: that is being written.
        total: bytes, or so many of ``unit``.
    """

    def __init__(self, what: str, total: int, unit: str = "GiB") -> None:
        self._what, self._unit, self._done = what, unit, 0.0
        self._size = 2**30 if unit == "GiB" else 1
        self._total = total / self._size
        self._last = time.monotonic()

    def add(self, amount: int) -> None:
        self._done += amount / self._size
        now = time.monotonic()
        if now - self._last >= _SECONDS:
            self._last = now
            say(f"{self._what}: {self._done:,.3g} of {self._total:,.3g} {self._unit}")


def say(line: str) -> None:
    """To standard error, at once: results go to standard output."""
    print(line, file=sys.stderr, flush=True)
