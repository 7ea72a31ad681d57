"""Connections by which the processes of a run know of each other's end: one from every process to rank 0.

The kernel keeps a connection, and ends it with its process, whatever the process is busy with: one that computes for
minutes without letting a thread run is not taken for lost, and one that was killed is known at once. A host that
vanishes is known by the kernel's keep-alive packets. A process that is stopped (SIGSTOP) keeps its connection, and is
as silent as one that is busy: both ends send a tick now and then, and the witness of one that sends none
(`skv_dist.parallel.processes.witness`) is asked which of the two it is.
"""

import contextlib
import math
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

from skv_dist.parallel.processes.witness import STOPPED, state_at

TICK_SECONDS = 10.0
_STOPPED_SECONDS = 45.0  # of silence, after which a process that is stopped is lost, as a host that vanished
_COLLECT_SECONDS = 1.0  # those that are lost within this time of the first, as the processes of one host, are one loss
# A peer that answers no packet for so long is gone: asked first after IDLE, then COUNT times.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6, "TCP_USER_TIMEOUT": 45_000}
_NO_WITNESSES: Mapping[int, int] = MappingProxyType({})
_TICK, _ENDED, _FAILED, _LOST = "tick", "ended", "failed", "lost"


class _Line:
    """One connection, on which both ends write lines of text."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(60)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.socket, self._unread, self._writing = connection, b"", threading.Lock()

    def write(self, text: str) -> None:
        with self._writing:
            self.socket.sendall(text.encode() + b"\n")

    def read(self) -> list[str]:
        """The lines that have come; waits for something to come. Raises OSError at the connection's end."""
        received = self.socket.recv(4096)
        if not received:
            raise ConnectionError
        *lines, self._unread = (self._unread + received).split(b"\n")
        return [line.decode() for line in lines]


class Watch:
    """One process's view of the others, kept by a thread from `start` to `close`.

    Args:
        patience: seconds after which a process that is silent, though its connection stands, is taken for lost, also
            where no witness says that it is stopped.
        witnesses: the port of each rank's witness; ranks that have none are missing.
    """

    def __init__(self, patience: float, witnesses: Mapping[int, int]) -> None:
        self._patience, self.witnesses = patience, witnesses
        self._tick_seconds = min(TICK_SECONDS, patience / 5)
        self._lost: list[int] = []
        self._settled = threading.Event()
        self._asked: set[int] = set()  # ranks whose witness has not answered yet
        self._stopped: dict[int, float] = {}  # ranks whose witness said so, and when it was asked
        self._closed = False
        self._bell, self._ring = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ)

    def start(self) -> None:
        threading.Thread(target=self._run, name="skv-watch", daemon=True).start()

    def lost(self, seconds: float | None = None) -> list[int]:
        """Ranks that were lost, waiting so long (None: until `close`) for news; empty where there is none."""
        self._settled.wait(seconds)
        return self._lost

    def close(self, failed: bool) -> None:
        """Tell the others that this process ends, and whether by an error of its own."""
        self._say(_FAILED if failed else _ENDED)
        self._closed = True
        self._settled.set()
        with contextlib.suppress(OSError):  # the thread may have ended
            self._ring.send(b"!")

    def _run(self) -> None:
        ticked = looked = time.monotonic()
        while not self._closed:
            for key, _ in self._selector.select(min(self._tick_seconds, _COLLECT_SECONDS)):
                if key.fileobj is not self._bell:
                    self._read(key)
            now = time.monotonic()
            # A thread that could not run for a while has not read what had come, and must not judge.
            self._judge(now, slept=now - looked > min(self._patience, _STOPPED_SECONDS) / 2)
            if now - ticked > self._tick_seconds:
                ticked = now
                self._say(_TICK)
                self._ask(now)
            looked = time.monotonic()
        for key in list(self._selector.get_map().values()):
            cast(socket.socket, key.fileobj).close()
        self._selector.close()

    def _settle(self, lost: list[int]) -> None:
        if not self._settled.is_set() and not self._closed:
            self._lost = lost
            self._settled.set()

    def _read(self, key: selectors.SelectorKey) -> None:
        raise NotImplementedError

    def _judge(self, now: float, slept: bool) -> None:
        raise NotImplementedError

    def _say(self, text: str) -> None:
        raise NotImplementedError

    def _ask(self, now: float) -> None:
        """Ask the witness of whoever was silent for long. Called once a tick."""
        raise NotImplementedError

    def _ask_about(self, rank: int, line: _Line) -> None:
        """In a thread of its own: where a host has vanished, each of its witnesses takes long not to answer."""
        with contextlib.suppress(OSError):  # the connection has just ended
            address, port = line.socket.getpeername()[0], self.witnesses.get(rank)
            if port is not None and rank not in self._asked:
                self._asked.add(rank)
                threading.Thread(target=self._hear_witness, args=(rank, address, port), daemon=True).start()

    def _hear_witness(self, rank: int, address: str, port: int) -> None:
        asked = time.monotonic()
        if state_at(address, port) == STOPPED:
            self._stopped[rank] = asked
        self._asked.discard(rank)

    def _is_lost(self, rank: int, heard: float, now: float) -> bool:
        """Whether who was heard last at ``heard`` is lost.

        An answer of its witness counts for the silence in which it was asked: a process that was stopped, ticked again
        and is busy now is not lost.
        """
        return now - heard > self._patience or self._stopped.get(rank, heard) - heard > _STOPPED_SECONDS


class Hub(Watch):
    """The view of rank 0, to which all others are connected: it judges, and tells them."""

    def __init__(self, size: int, patience: float, witnesses: Mapping[int, int] = _NO_WITNESSES) -> None:
        super().__init__(patience, witnesses)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=dual)
        self.port = int(self._listener.getsockname()[1])
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._lines: dict[int, _Line] = {}
        self.ticks = dict.fromkeys(range(1, size), 0)  # heard so far
        self._heard = dict.fromkeys(range(1, size), time.monotonic())  # last, of those that have not ended
        self._missing: dict[int, float] = {}  # since when

    def _read(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._listener:
            connection, _ = self._listener.accept()
            self._selector.register(connection, selectors.EVENT_READ, _Line(connection))
            return
        line: _Line = key.data
        rank = next((rank for rank, other in self._lines.items() if other is line), None)
        try:
            for text in line.read():
                word, _, number = text.partition(" ")
                if word == "rank":
                    rank = int(number)
                    self._lines[rank] = line
                elif rank is not None:
                    self._hear(rank, word)
        except (OSError, ValueError):
            self._selector.unregister(line.socket)
            line.socket.close()
            if rank in self._heard:
                self._missing.setdefault(rank, time.monotonic())

    def _hear(self, rank: int, word: str) -> None:
        if word == _TICK:
            self.ticks[rank] += 1
            self._heard[rank] = time.monotonic()
        elif word == _ENDED:
            self._heard.pop(rank, None)
        elif word == _FAILED:
            self._missing.setdefault(rank, time.monotonic())

    def _judge(self, now: float, slept: bool) -> None:
        if slept:
            self._heard = dict.fromkeys(self._heard, now)
        for rank, heard in self._heard.items():
            if self._is_lost(rank, heard, now):
                self._missing.setdefault(rank, now)
        first = min(self._missing.values(), default=math.inf)
        if not self._settled.is_set() and now - first > _COLLECT_SECONDS:
            lost = sorted(self._missing)
            self._settle(lost)
            self._say(f"{_LOST} {' '.join(map(str, lost))}")

    def _say(self, text: str) -> None:
        for line in list(self._lines.values()):
            with contextlib.suppress(OSError):  # the thread that reads will notice
                line.write(text)

    def _ask(self, now: float) -> None:
        for rank, heard in self._heard.items():
            if rank in self._lines and now - heard > _STOPPED_SECONDS:
                self._ask_about(rank, self._lines[rank])


class Member(Watch):
    """The view of any other rank: it sees rank 0, and hears from it of the rest."""

    def __init__(
        self, rank: int, address: str, port: int, patience: float, witnesses: Mapping[int, int] = _NO_WITNESSES
    ) -> None:
        super().__init__(patience, witnesses)
        self._line = _Line(socket.create_connection((address, port), timeout=60))
        self._selector.register(self._line.socket, selectors.EVENT_READ)
        self._line.write(f"rank {rank}")
        self._heard = time.monotonic()

    def _read(self, key: selectors.SelectorKey) -> None:
        try:
            for text in self._line.read():
                self._heard = time.monotonic()
                word, *numbers = text.split()
                if word == _LOST:
                    self._settle([int(number) for number in numbers])
                elif word == _FAILED:
                    self._settle([0])
                elif word == _ENDED:  # whoever is lost from here on, rank 0 does not need it any more
                    self._closed = True
        except OSError:
            self._selector.unregister(self._line.socket)
            self._settle([0])

    def _judge(self, now: float, slept: bool) -> None:
        if slept:
            self._heard = now
        if self._is_lost(0, self._heard, now):
            self._settle([0])

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._line.write(text)

    def _ask(self, now: float) -> None:
        if now - self._heard > _STOPPED_SECONDS:
            self._ask_about(0, self._line)
