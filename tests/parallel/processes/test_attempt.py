"""Processes that torchrun starts again meet those of their own attempt, and nobody who has died."""

import datetime
import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from skv_dist.errors import UserError
from skv_dist.parallel.processes.attempt import meet

LONG = datetime.timedelta(minutes=5)


@pytest.fixture
def port() -> Iterator[int]:
    """Of a store that outlives the attempts, as torchrun's."""
    kept = dist.TCPStore("127.0.0.1", 0, None, True, LONG, wait_for_workers=False)
    yield kept.port
    del kept


class Started:
    """A rank that meets the others, in a thread, with a client of its own."""

    def __init__(self, port: int, rank: int, size: int = 3) -> None:
        self.name: str | None = None
        self.store = dist.TCPStore("127.0.0.1", port, None, False, LONG, wait_for_workers=False)
        self._thread = threading.Thread(target=self._run, args=(rank, size), daemon=True)
        self._thread.start()

    def _run(self, rank: int, size: int) -> None:
        self.name = meet(self.store, rank, size, LONG)

    def met(self) -> str | None:
        self._thread.join(60)
        return self.name

    def waits(self) -> bool:
        self._thread.join(0.5)
        return self._thread.is_alive()


def test_all_of_an_attempt_get_one_name_and_each_attempt_another(port: int) -> None:
    names = []
    for _ in range(2):
        started = [Started(port, rank) for rank in (2, 0, 1)]
        (name,) = {one.met() for one in started}
        names.append(name)
    assert None not in names
    assert names[0] != names[1]


@pytest.mark.parametrize("late", [0, 1, 2])
def test_who_comes_early_waits_for_those_of_its_own_attempt(port: int, late: int) -> None:
    """The keys of the attempt before are still there, answers included."""
    before = [Started(port, rank) for rank in range(3)]
    assert len({one.met() for one in before}) == 1
    early = [Started(port, rank) for rank in range(3) if rank != late]
    assert all(one.waits() for one in early)
    found = {one.met() for one in (*early, Started(port, late))}
    assert len(found) == 1
    assert None not in found
    assert found != {before[0].name}


def test_one_that_starts_again_while_the_others_wait_is_called_again(port: int) -> None:
    gone = Started(port, 1)  # answers nobody yet
    assert gone.waits()
    first, again = Started(port, 0), Started(port, 1)
    assert first.waits()
    last = Started(port, 2)
    assert first.met() == again.met() == last.met() is not None


def test_who_does_not_come_is_named(port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, None, False, LONG, wait_for_workers=False)
    with pytest.raises(UserError, match=r"cannot meet: rank 1, rank 2 did not come within 0\.005 minutes"):
        meet(store, 0, 3, datetime.timedelta(seconds=0.3))
