"""Tells which process was lost.

A collective that fails says that some peer is gone, seldom which; and where the main thread waits for a GPU that
waits for the lost peer, nothing fails at all. Every process therefore watches the others by connections of their own
(`skv_dist.parallel.processes.lines`), which have nothing to do with those of the process groups.
"""

import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist

from skv_dist.config.parallel import ParallelConfig
from skv_dist.errors import UserError, cause_in_one_line
from skv_dist.parallel.processes.lines import Hub, Member, Watch
from skv_dist.parallel.processes.report import report_error
from skv_dist.parallel.processes.witness import Witness

_NEWS_SECONDS = 5.0  # for news of a loss to arrive, once a transfer has failed
_GRACE_SECONDS = 20.0  # for the main thread to end by itself, with an error of its own, once a loss is known


def place_of(rank: int, parallel: ParallelConfig, world_size: int) -> str:
    """A rank in words, from Megatron's rank order (tp, dp, pp)."""
    replicas = world_size // (parallel.tensor * parallel.pipeline)
    rest, tensor = divmod(rank, parallel.tensor)
    stage, replica = divmod(rest, replicas)
    return f"rank {rank} (stage {stage}, replica {replica}, tensor rank {tensor})"


class Heartbeat:
    """Watches the other processes, from construction until `stop`. Process groups must exist. Collective."""

    def __init__(self, parallel: ParallelConfig) -> None:
        self._rank, self._size, self._parallel = dist.get_rank(), dist.get_world_size(), parallel
        self._stopped = threading.Event()
        self._hosts = [socket.gethostname()]
        self.watch: Watch | None = None
        self._witness: Witness | None = None
        if self._size > 1:
            self.watch = self._connect(patience=30 * parallel.timeout_minutes)
            self.watch.start()
            threading.Thread(target=self._end_if_lost, name="skv-heartbeat", daemon=True).start()

    def _connect(self, patience: float) -> Watch:
        self._witness = Witness()
        # Rank 0 listens before the others hear of its port.
        hub = Hub(self._size, patience) if self._rank == 0 else None
        found = (self._hosts[0], self._witness.port, hub.port if hub else None)
        of_all: list[tuple[str, int | None, int | None]] = [found] * self._size
        dist.all_gather_object(of_all, found)
        self._hosts = [host for host, _, _ in of_all]
        witnesses = {rank: port for rank, (_, port, _) in enumerate(of_all) if port is not None}
        if hub:
            hub.witnesses = witnesses
            return hub
        address, port = os.environ["MASTER_ADDR"], of_all[0][2]  # the host of rank 0, by which all have met
        assert port is not None
        try:
            return Member(self._rank, address, port, patience, witnesses)
        except OSError as error:
            raise UserError(
                f"rank {self._rank} on {self._hosts[self._rank]} cannot connect to rank 0 at {address}, port {port} "
                f"({cause_in_one_line(error)}): let the hosts of a run reach each other on all ports"
            ) from error

    def _end_if_lost(self) -> None:
        assert self.watch is not None
        lost = self.watch.lost()
        if lost and not self._stopped.wait(_GRACE_SECONDS):
            report_error(self.message(lost))
            os._exit(2)

    def message(self, lost: list[int]) -> str:
        """The same on all processes, so that one of each host need say it."""
        places = []
        for host, ranks in itertools.groupby(lost, lambda rank: self._hosts[rank]):
            of_host = [place_of(rank, self._parallel, self._size) for rank in ranks]
            places.append(f"{', '.join(of_host)} on {host}")
        return f"contact was lost with {'; '.join(places)}; look at the output there and start the run again"

    def lost(self) -> list[int]:
        """Ranks that were lost; empty where none is known to be."""
        return self.watch.lost(_NEWS_SECONDS) if self.watch else []

    def stop(self, failed: bool) -> None:
        """Tell the others that this process ends, and whether by an error."""
        self._stopped.set()
        if self.watch:
            self.watch.close(failed)
        if self._witness:
            self._witness.stop()


@contextlib.contextmanager
def naming_lost_peers(parallel: ParallelConfig) -> Iterator[None]:
    """Turns the failure of a transfer into one line that says which process was lost.

    Raises:
        UserError: in place of the transfer's error, where a process was lost.
    """
    heartbeat, failed = Heartbeat(parallel), True
    try:
        yield
        failed = False
    except torch.OutOfMemoryError:  # is a RuntimeError, and nobody else's fault
        raise
    except RuntimeError as error:
        if lost := heartbeat.lost():
            raise UserError(heartbeat.message(lost)) from error
        raise
    finally:
        heartbeat.stop(failed)
