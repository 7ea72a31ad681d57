"""SIGTERM and Ctrl-C end a run behind the step in progress, and not the process at once."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Any

_INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended, as shells have it
_ONE_PRESS_SECONDS = 1.0  # a launcher may pass one Ctrl-C on twice, also as a SIGTERM


# Where processes, or one after the other, got both, it was a Ctrl-C that a launcher passed on in its own way.
BY_WEIGHT = (None, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """What asked the run to stop since `defer`, as an index of `BY_WEIGHT`; 0: nothing did.

    A second Ctrl-C ends the process at once. A thread takes the signals: the main thread may wait in a collective for
    long, and would not run a handler meanwhile. As a context manager it puts back what `defer` has changed.
    """

    def __init__(self) -> None:
        self.weight = 0
        self._says_so = False
        self._handlers: dict[int, Any] = {}
        self._interrupted: float | None = None

    def __enter__(self) -> "StopRequest":
        return self

    def defer(self, says_so: bool) -> None:
        """From here on signals are requests; ``says_so``: whether this process tells the user."""
        self._says_so = says_so
        self._arrivals, self._notices = socket.socketpair()
        self._notices.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._notices.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or behind a shell's &
                self._handlers[number] = signal.signal(number, lambda *_: None)  # Python then notices the thread
        threading.Thread(target=self._run, name="skv-signals", daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while numbers := self._arrivals.recv(64):
                for number in numbers:
                    if number in self._handlers:
                        self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if self._interrupted is not None:
            if now - self._interrupted > _ONE_PRESS_SECONDS:  # torchrun passes a second Ctrl-C on as SIGTERM
                os.write(2, b"interrupted again: ending at once\n")
                os._exit(_INTERRUPTED)
            return
        if number == signal.SIGINT:
            self._interrupted = now
            if self._says_so:
                print("stopping after this step; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        self.weight = max(self.weight, BY_WEIGHT.index(signal.Signals(number)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
            self._handlers = {}
            self._notices.close()
