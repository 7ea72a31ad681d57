"""Tells which process was lost.

A collective that fails says that some peer is gone, seldom which. Every process therefore ticks in the launcher's
key-value store; when a transfer fails, the survivors look whose ticks stand still, and the first to know leaves a
note for those whose turn to fail comes later, when more processes have ended.

Where nothing fails, because the main thread waits for a GPU that waits for the lost peer, the ticking thread ends the
process: rank 0 watches all, the others its note and rank 0.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator

import torch.distributed as dist

from skv_dist.config.parallel import ParallelConfig
from skv_dist.errors import UserError

_TICK_SECONDS = 1.0
_STILL_SECONDS = 5.0  # a tick that stands still for so long belongs to a lost process
_LONGEST_PATIENCE = 60.0  # before the thread gives up on a process that does not tick; half the time-out if shorter
_NOTE, _ENDED = "lost", "ended"


def place_of(rank: int, parallel: ParallelConfig, world_size: int) -> str:
    """A rank in words, from Megatron's rank order (tp, dp, pp)."""
    replicas = world_size // (parallel.tensor * parallel.pipeline)
    rest, tensor = divmod(rank, parallel.tensor)
    stage, replica = divmod(rest, replicas)
    return f"rank {rank} (stage {stage}, replica {replica}, tensor rank {tensor})"


class Heartbeat:
    """Ticks on a thread from construction until `stop`. Process groups must exist."""

    def __init__(self, parallel: ParallelConfig) -> None:
        self._rank, self._size, self._parallel = dist.get_rank(), dist.get_world_size(), parallel
        self._store = dist.PrefixStore("skv_dist/heartbeat", dist.distributed_c10d._get_default_store())
        self._stopped = threading.Event()
        self._patience = min(_LONGEST_PATIENCE, 30 * parallel.timeout_minutes)
        self._store.set(str(self._rank), "0")
        if self._size > 1:
            threading.Thread(target=self._run, name="skv-heartbeat", daemon=True).start()

    def _run(self) -> None:
        watched = range(1, self._size) if self._rank == 0 else (0,)
        seen: dict[int, tuple[bytes, float]] = {}  # tick, and when it was new
        number, looked = 0, time.monotonic()
        try:
            while not self._stopped.wait(_TICK_SECONDS):
                number += 1
                self._store.set(str(self._rank), str(number))
                if time.monotonic() - looked > self._patience / 3:
                    looked = time.monotonic()
                    self._look(watched, seen)
            self._say_ended()
        except RuntimeError:  # the process with the store is gone; the main thread notices by itself, unless it waits
            if not self._stopped.wait(self._patience):
                self._end([0])

    def _look(self, watched: Iterable[int], seen: dict[int, tuple[bytes, float]]) -> None:
        now = time.monotonic()
        for rank, tick in self._ticks(watched).items():
            if rank not in seen or seen[rank][0] != tick:
                seen[rank] = tick, now
        still = self._noted()
        if not still:
            ended = _ENDED.encode()
            still = [rank for rank, (tick, since) in seen.items() if tick != ended and now - since > self._patience]
            if still:
                self._store.set(_NOTE, " ".join(map(str, still)))
        # The main thread may be about to say so itself. Rank 0 may hold the store: the others must have looked before.
        grace = 2 * _STILL_SECONDS if self._rank else 3 * _STILL_SECONDS + self._patience / 3
        if still and not self._stopped.wait(grace):
            self._end(still)

    def _end(self, lost: list[int]) -> None:
        print(f"error: {self.message(lost)}", file=sys.stderr, flush=True)
        os._exit(2)

    def message(self, lost: list[int]) -> str:
        places = ", ".join(place_of(rank, self._parallel, self._size) for rank in lost)
        return f"rank {self._rank} ends: contact was lost with {places}; look at its output and start the run again"

    def stop(self) -> None:
        self._stopped.set()
        self._say_ended()

    def _say_ended(self) -> None:
        with contextlib.suppress(RuntimeError):  # the process with the store may have ended before
            self._store.set(str(self._rank), _ENDED)

    def lost(self) -> list[int]:
        """Ranks that do not tick any more; empty where all do."""
        if self._size == 1:
            return []
        try:
            if noted := self._noted():
                return noted
            others = [rank for rank in range(self._size) if rank != self._rank]
            before = self._ticks(others)
            time.sleep(_STILL_SECONDS)
            if noted := self._noted():
                return noted
            still = [rank for rank, ticks in self._ticks(others).items() if ticks == before[rank]]
            if still:
                self._store.set(_NOTE, " ".join(map(str, still)))
            return still
        except RuntimeError:
            return [0]  # which keeps the store where no launcher does

    def _noted(self) -> list[int]:
        return [int(rank) for rank in self._store.get(_NOTE).decode().split()] if self._store.check([_NOTE]) else []

    def _ticks(self, ranks: Iterable[int]) -> dict[int, bytes]:
        # get() would wait for a key that is not there
        return {rank: self._store.get(str(rank)) if self._store.check([str(rank)]) else b"" for rank in ranks}


@contextlib.contextmanager
def naming_lost_peers(parallel: ParallelConfig) -> Iterator[None]:
    """Turns the failure of a transfer into one line that says which process was lost.

    Raises:
        UserError: in place of the transfer's error, where a process no longer ticks.
    """
    heartbeat = Heartbeat(parallel)
    try:
        yield
    except RuntimeError as error:
        lost = heartbeat.lost()
        if not lost:
            raise
        if dist.get_rank() == 0:
            time.sleep(2 * _STILL_SECONDS)  # the store may be ours, and others have yet to look into it
        raise UserError(heartbeat.message(lost)) from error
    finally:
        heartbeat.stop()
