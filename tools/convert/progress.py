"""Lines that say how far a long conversion is."""

import sys
import time

_SECONDS = 10.0


class Progress:
    """Prints a line every ten seconds; nothing for what is done before.

    Args:
        what: that is being written.
        total: bytes.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._last = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if now - self._last >= _SECONDS:
            self._last = now
            part = f"{self._done / 2**30:,.1f} of {self._total / 2**30:,.1f} GiB"
            say(f"{self._what}: {part}")


def say(line: str) -> None:
    """To standard error, at once: results go to standard output."""
    print(line, file=sys.stderr, flush=True)
