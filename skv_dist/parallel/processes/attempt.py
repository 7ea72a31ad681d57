"""The meeting of the processes of one attempt, where torchrun starts them again and again.

torchrun keeps the store in which process groups write their addresses for as long as it lives, and torch writes those
of each attempt over those of the one before. Hosts notice a loss at different moments: a process that starts early
would read where a dead one listened, and each of its attempts would end so. Hence rank 0 calls the roll: only those
who answer it belong to this attempt, and its keys have a name of their own.
"""

import datetime
import json
import os
import secrets
import time

import torch.distributed as dist

from skv_dist.errors import UserError

_LOOK_SECONDS = 0.1


def own_store(timeout: datetime.timedelta) -> dist.Store | None:
    """The part of torchrun's store that belongs to this attempt; None where the launcher keeps no store.

    Returns once all processes of the attempt have met.

    Raises:
        UserError: some did not come within ``timeout``.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, None, False, timeout, wait_for_workers=False)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return dist.PrefixStore(f"skv_dist/{meet(store, rank, size, timeout)}", store)


def meet(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> str:
    """A name that all processes of this attempt get, and nobody else.

    Raises:
        UserError: some did not come within ``timeout``.
    """
    store = dist.PrefixStore("skv_dist/roll", store)
    own = secrets.token_hex(8)
    store.set(f"here/{rank}", own)
    meeting = _Roll(store, size) if rank == 0 else _Answer(store, rank, own)
    deadline = time.monotonic() + timeout.total_seconds()
    while (name := meeting.look()) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"the processes cannot meet: {meeting.missing()} did not come within "
                f"{timeout.total_seconds() / 60:g} minutes (parallel.timeout_minutes); look at its output"
            )
        time.sleep(_LOOK_SECONDS)
    return name


class _Roll:
    """As rank 0 calls it: anew whenever another process has come in the place of one that it called before."""

    def __init__(self, store: dist.Store, size: int) -> None:
        self._store, self._size = store, size
        self._called: list[str] = []
        self._name = ""

    def look(self) -> str | None:
        here = [f"here/{rank}" for rank in range(self._size)]
        if not self._store.check(here):
            return None
        present = [own.decode() for own in self._store.multi_get(here)]
        if present != self._called:
            self._called, self._name = present, secrets.token_hex(8)
            self._store.set("called", json.dumps([self._name, present]))
        if self._size > 1 and not self._store.check([f"{self._name}/{rank}" for rank in range(1, self._size)]):
            return None
        self._store.set(f"{self._name}/complete", "")
        return self._name

    def missing(self) -> str:
        answers = {rank: f"{self._name}/{rank}" if self._name else f"here/{rank}" for rank in range(1, self._size)}
        return ", ".join(f"rank {rank}" for rank, key in answers.items() if not self._store.check([key]))


class _Answer:
    """As any other rank answers it, if it was called itself and not one that had its place before."""

    def __init__(self, store: dist.Store, rank: int, own: str) -> None:
        self._store, self._rank, self._own = store, rank, own
        self._answered: str | None = None

    def look(self) -> str | None:
        if not self._store.check(["called"]):
            return None
        name, present = json.loads(self._store.get("called"))
        if self._own != dict(enumerate(present)).get(self._rank):
            return None
        if self._answered != name:
            self._store.set(f"{name}/{self._rank}", "")
            self._answered = name
        return name if self._store.check([f"{name}/complete"]) else None

    def missing(self) -> str:
        return "rank 0" if self._answered is None else "another rank"
