"""Tells which process was lost.

A collective that fails says that some peer is gone, seldom which. Every process therefore ticks in the launcher's
key-value store; when a transfer fails, the survivors look whose ticks stand still, and the first to know leaves a
note for those whose turn to fail comes later, when more processes have ended.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from skv_dist.config.parallel import ParallelConfig
from skv_dist.errors import UserError

_TICK_SECONDS = 1.0
_STILL_SECONDS = 5.0  # a tick that stands still for so long belongs to a lost process
_NOTE = "lost"


def place_of(rank: int, parallel: ParallelConfig, world_size: int) -> str:
    """A rank in words, from Megatron's rank order (tp, dp, pp)."""
    replicas = world_size // (parallel.tensor * parallel.pipeline)
    rest, tensor = divmod(rank, parallel.tensor)
    stage, replica = divmod(rest, replicas)
    return f"rank {rank} (stage {stage}, replica {replica}, tensor rank {tensor})"


class Heartbeat:
    """Ticks on a thread from construction until `stop`. Process groups must exist."""

    def __init__(self) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._store = dist.PrefixStore("skv_dist/heartbeat", dist.distributed_c10d._get_default_store())
        self._stopped = threading.Event()
        self._tick(0)
        if self._size > 1:
            threading.Thread(target=self._run, name="skv-heartbeat", daemon=True).start()

    def _tick(self, number: int) -> None:
        self._store.set(str(self._rank), str(number))

    def _run(self) -> None:
        number = 0
        # An error here means that the process with the store is gone; the main thread will notice by itself.
        with contextlib.suppress(RuntimeError):
            while not self._stopped.wait(_TICK_SECONDS):
                number += 1
                self._tick(number)

    def stop(self) -> None:
        self._stopped.set()

    def lost(self) -> list[int]:
        """Ranks that do not tick any more; empty where all do."""
        if self._size == 1:
            return []
        try:
            if self._store.check([_NOTE]):
                return [int(rank) for rank in self._store.get(_NOTE).decode().split()]
            before = self._ticks()
            time.sleep(_STILL_SECONDS)
            if self._store.check([_NOTE]):
                return self.lost()
            still = [rank for rank, ticks in self._ticks().items() if ticks == before[rank]]
            if still:
                self._store.set(_NOTE, " ".join(map(str, still)))
            return still
        except RuntimeError:
            return [0]  # which keeps the store where no launcher does

    def _ticks(self) -> dict[int, bytes]:
        ticks = {}
        for rank in range(self._size):
            if rank != self._rank:
                key = str(rank)
                ticks[rank] = self._store.get(key) if self._store.check([key]) else b""  # get() would wait for it
        return ticks


@contextlib.contextmanager
def naming_lost_peers(parallel: ParallelConfig) -> Iterator[None]:
    """Turns the failure of a transfer into one line that says which process was lost.

    Raises:
        UserError: in place of the transfer's error, where a process no longer ticks.
    """
    heartbeat = Heartbeat()
    try:
        yield
    except RuntimeError as error:
        lost = heartbeat.lost()
        if not lost:
            raise
        if dist.get_rank() == 0:
            time.sleep(2 * _STILL_SECONDS)  # the store may be ours, and others have yet to look into it
        places = ", ".join(place_of(rank, parallel, dist.get_world_size()) for rank in lost)
        raise UserError(
            f"rank {dist.get_rank()} ends: contact was lost with {places}; look at its output and start the run again"
        ) from error
    finally:
        heartbeat.stop()
