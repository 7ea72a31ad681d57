"""A small process beside each process of a run that can say whether that one is stopped.

A process that is stopped (SIGSTOP, Ctrl-Z, a suspended job) cannot say so, and to the others it looks like one that
computes for minutes without letting a thread run. The kernel knows the difference. The witness answers every connection
with the one letter by which `/proc` has the state of its parent, and ends soon after it. It is a plain Python without
torch, of a few megabytes, and never speaks first.
"""

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

STOPPED = "T"  # by a signal; a debugger's stop is another state
_ANSWERS_WITHIN = 30.0  # seconds, for which it needs a thousandth of one unless its host has no memory left


class Witness:
    """The witness of this process, from construction until `stop`.

    Attributes:
        port: on which it answers; None where there can be none (no `/proc`, no process to be had).
    """

    def __init__(self) -> None:
        self.port: int | None = None
        self._process: subprocess.Popen[str] | None = None
        if not Path("/proc/self/stat").exists():
            return
        with contextlib.suppress(OSError, ValueError):
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # what stops a whole process group, as Ctrl-Z does, must not stop it
            )
            assert self._process.stdout is not None
            self.port = int(self._process.stdout.readline())

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def state_at(address: str, port: int) -> str | None:
    """The state of the process whose witness answers there; None where there is no witness.

    One that takes the connection, as the kernel does for it, and does not answer is stopped itself, and with it all
    that runs there: a container that was paused.
    """
    try:
        with socket.create_connection((address, port), timeout=_ANSWERS_WITHIN) as connection:
            try:
                return connection.recv(1).decode() or None
            except TimeoutError:
                return STOPPED
    except OSError:
        return None


def _serve() -> None:
    """Answer until the parent is gone."""
    import os

    parent = os.getppid()
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as listener:
        print(listener.getsockname()[1], flush=True)
        listener.settimeout(5.0)
        while os.getppid() == parent:
            with contextlib.suppress(OSError):  # nobody asks, or does not wait for the answer
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[0].encode())


if __name__ == "__main__":
    _serve()
