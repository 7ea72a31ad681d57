"""One rank of each replica reads a stream; the others receive what it read.

Everything is sent from the main thread, over groups of gloo that nothing else uses: a transfer cannot get between
those of training, whichever thread reads ahead. Before anything is sent all ranks learn whether every reader
succeeded, so that one bad row ends the run with one line, and nobody waits for a reader that has given up.
"""

import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.data.batches import MicroBatch, packed, unpacked
from skv_dist.errors import UserError, cause_in_one_line
from skv_dist.parallel.processes.agree import first_error

# A reader may have to read for long: through a compressed file, from a slow hub. Lost ranks are noticed elsewhere.
_PATIENCE = datetime.timedelta(days=1)


class SharedReading:
    """The groups of readers and receivers. Construction is collective, and so is each method but `close`.

    Attributes:
        reads: whether this rank is the one of its replica that reads.
    """

    def __init__(self) -> None:
        replica = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
        self._reader = replica[0]
        self.reads = dist.get_rank() == self._reader
        self._everybody = self._replica = None
        if dist.get_world_size() > 1:
            self._everybody = dist.new_group(backend="gloo", timeout=_PATIENCE)
        if len(replica) > 1:
            # Made by all ranks for all replicas: torch names a group that its members alone make after their ranks, and
            # a second one of that name would read where the first had listened.
            everybody: list[list[int]] = [[]] * dist.get_world_size()
            dist.all_gather_object(everybody, replica, group=self._everybody)
            for ranks in sorted({tuple(each) for each in everybody}):
                group = dist.new_group(ranks, backend="gloo", timeout=_PATIENCE)
                if dist.get_rank() in ranks:
                    self._replica = group

    def share(
        self, read: Callable[[], list[MicroBatch]], numbers: list[int], size: tuple[int, int], *, documents: bool
    ) -> list[MicroBatch]:
        """What ``read()`` returns on the reader, on every rank of its replica.

        Args:
            read: called on readers alone.
            numbers: of the micro-batches within the global batch.
            size: b and s of each.
            documents: whether they say where documents begin (``data.reset_attention``).

        Raises:
            UserError: a reader failed; on all ranks alike.
        """
        batches: list[MicroBatch] = []
        failure: Exception | None = None
        if self.reads:
            try:
                batches = read()
            except Exception as problem:  # whatever it is, the others must not wait for it
                failure = problem
        self._agree(failure)
        if self._replica is None:
            return batches
        rows, columns = size
        if self.reads:
            planes = packed(batches)
        else:
            planes = torch.empty(3 if documents else 2, len(numbers), rows, columns + 1, dtype=torch.int32)
        dist.broadcast(planes, src=self._reader, group=self._replica)
        return batches if self.reads else unpacked(planes, numbers)

    def _agree(self, failure: Exception | None) -> None:
        if self._everybody is None:
            if failure is not None:
                raise failure
            return
        failed = torch.tensor(int(failure is not None))
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._everybody)
        if not failed:
            return
        text = None if failure is None else str(failure)
        if failure is not None and not isinstance(failure, UserError):
            text = (
                f"rank {dist.get_rank()} cannot read the data ({type(failure).__name__}: {cause_in_one_line(failure)})"
            )
        agreed = first_error(text, self._everybody)
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        raise UserError(agreed or "the data cannot be read")

    def gathered(self, value: Any) -> list[Any]:
        """The values of all readers, on the first rank; empty on the others.

        Args:
            value: of this rank; not looked at where it does not read.
        """
        mine = [value] if self.reads else []
        if self._everybody is None:
            return mine
        first = dist.get_rank() == 0
        found: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object(mine, found, dst=0, group=self._everybody)
        return [entry for entries in found or [] for entry in entries]

    def close(self) -> None:
        """Destroy the groups."""
        for group in (self._replica, self._everybody):
            if group is not None:
                dist.destroy_process_group(group)
        self._replica = self._everybody = None
