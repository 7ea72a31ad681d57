"""One process at a time makes a prepared set; others that want the same wait for it.

A lock file beside the set names host and process. Its owner touches it every few seconds, so a lock that nobody
touches any more belonged to a killed process, on whichever host; clocks of two hosts are never compared. Waiting is
reading the disk: no collective, no time limit.
"""

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from skv_dist.errors import UserError
from skv_dist.files import WRITING

_TOUCH_SECONDS = 5.0
_ABANDONED_SECONDS = 120.0  # without a touch; network file systems show one late
_ABANDONED_HERE_SECONDS = 15.0  # where the process that the lock names is not there any more
_SAY_SECONDS = 60.0


class BeingMadeError(UserError):
    """Another process makes the folder."""


@contextmanager
def making(out: Path) -> Iterator[None]:
    """Hold the lock of ``out``; remove what a killed process left of it.

    Raises:
        BeingMadeError: another process holds the lock.
        UserError: the folder around ``out`` cannot be written.
    """
    lock = _lock_of(out)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError as error:
        raise BeingMadeError(
            f"{out} is being made by {_owner(lock)}: wait for it, or remove {lock} if it is gone"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(f"{socket.gethostname()} {os.getpid()}\n")
    except OSError as error:  # a full disk has room for a name and not for what is in the file
        lock.unlink(missing_ok=True)
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    done = threading.Event()
    threading.Thread(target=_touch, args=(lock, done), name="skv-lock", daemon=True).start()
    try:
        for left in out.parent.glob(f".{out.name}.*{WRITING}"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        done.set()
        lock.unlink(missing_ok=True)


def made_once(out: Path, make: Callable[[], None]) -> Path:
    """``out``, made by this process or by another that wants the same.

    Raises:
        UserError: ``make`` failed.
    """
    watch = _Watch(_lock_of(out))
    while not out.exists():
        try:
            with making(out):
                if not out.exists():  # the process before may have finished between the two looks
                    make()
        except BeingMadeError:
            watch.look(out)
            time.sleep(1.0)
        except UserError:
            if not out.exists():
                raise  # else another process was first, in spite of the lock: its folder is as good
    return out


def pass_abandoned(out: Path) -> None:
    """Where a process of this host left its lock of ``out`` and is gone, remove the lock."""
    lock = _lock_of(out)
    watch = _Watch(lock)
    while _is_gone(_text_of(lock)):
        watch.look(out)
        time.sleep(0.1)


class _Watch:
    """Looks at a lock of another process, says who holds it, and removes it once it is abandoned."""

    def __init__(self, lock: Path) -> None:
        self._lock = lock
        self._seen: tuple[str, int] | None = None
        self._since = time.monotonic()
        self._said = -_SAY_SECONDS

    def look(self, out: Path) -> None:
        now = time.monotonic()
        try:
            state = (self._lock.read_text(), self._lock.stat().st_mtime_ns)
        except OSError:  # just released
            return
        if state != self._seen:
            self._seen, self._since = state, now
        patience = _ABANDONED_HERE_SECONDS if _is_gone(state[0]) else _ABANDONED_SECONDS
        if now - self._since > patience:
            print(f"{self._lock}: left by a process that is gone, removed", flush=True)
            self._lock.unlink(missing_ok=True)
        elif now - self._said >= _SAY_SECONDS and os.environ.get("LOCAL_RANK", "0") == "0":
            self._said = now
            print(f"waiting for {out}, which {_owner(self._lock)} prepares", flush=True)


def _lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")


def _owner(lock: Path) -> str:
    try:
        host, pid = _text_of(lock).split()
    except ValueError:
        return "another process"
    return f"process {pid} on {host}"


def _text_of(lock: Path) -> str:
    try:
        return lock.read_text()
    except OSError:  # released meanwhile
        return ""


def _is_gone(text: str) -> bool:
    """Whether a lock names a process of this host that is not there."""
    try:
        host, pid = text.split()
        return host == socket.gethostname() and not Path("/proc", pid).exists() and Path("/proc/self").exists()
    except ValueError:
        return False


def _touch(lock: Path, done: threading.Event) -> None:
    while not done.wait(_TOUCH_SECONDS):
        try:
            os.utime(lock)
        except OSError:  # removed by somebody who thought us gone; the rename at the end decides
            return
