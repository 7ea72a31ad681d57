"""Who is taken for lost, and who is not: connections between threads of one process, and a busy process group."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from skv_dist.parallel.processes import lines, witness
from skv_dist.parallel.processes.lines import Hub, Member
from skv_dist.parallel.processes.witness import STOPPED, state_at

LONG = 120.0  # no test waits so long unless it fails


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(lines, "_COLLECT_SECONDS", 0.2)


@contextlib.contextmanager
def world(size: int, patience: float = 1000) -> Iterator[tuple[Hub, list[Member]]]:
    hub = Hub(size, patience)
    members = [Member(rank, "127.0.0.1", hub.port, patience) for rank in range(1, size)]
    for watch in (hub, *members):
        watch.start()
    wait_for(lambda: len(hub._lines) == size - 1)
    yield hub, members
    for watch in (hub, *members):
        watch.close(failed=False)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_hear_which_process_was_lost() -> None:
    with world(4) as (hub, members):
        members[1]._line.socket.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that was killed
        assert hub.lost(LONG) == members[0].lost(LONG) == members[2].lost(LONG) == [2]


def test_one_that_fails_by_itself_is_named_and_one_that_has_ended_is_not() -> None:
    with world(4) as (hub, members):
        members[0].close(failed=False)
        members[2].close(failed=True)
        assert hub.lost(LONG) == members[1].lost(LONG) == [3]


def test_processes_that_are_lost_together_are_named_together() -> None:
    with world(4) as (hub, members), mock.patch.object(lines, "_COLLECT_SECONDS", 2.0):
        for rank in (2, 3):
            members[rank - 1].close(failed=True)
        assert hub.lost(LONG) == members[0].lost(LONG) == [2, 3]


def test_rank_0_is_missed_by_the_others() -> None:
    with world(3) as (hub, members):
        hub.close(failed=True)
        assert [member.lost(LONG) for member in members] == [[0], [0]]
    with world(3) as (hub, members):
        for line in hub._lines.values():
            line.socket.shutdown(socket.SHUT_RDWR)
        assert [member.lost(LONG) for member in members] == [[0], [0]]


def test_nobody_is_lost_where_all_end_well() -> None:
    with world(3) as (hub, members):
        pass
    assert [watch.lost(LONG) for watch in (hub, *members)] == [[], [], []]


def test_one_that_is_silent_though_its_connection_stands_is_lost_after_a_while() -> None:
    hub = Hub(2, patience=0.5)
    silent = socket.create_connection(("127.0.0.1", hub.port))
    silent.sendall(b"rank 1\n")
    hub.start()
    assert hub.lost(LONG) == [1]
    hub.close(failed=False)


# Sorting holds Python's lock from start to end, so that nothing of the process ticks: the kernel keeps its connection.
BUSY = """
import os, random, sys
from skv_dist.parallel.processes import lines
from skv_dist.parallel.processes.witness import Witness
lines.TICK_SECONDS = 0.02
witness = Witness()
print(witness.port, flush=True)
member = lines.Member(1, "127.0.0.1", int(sys.argv[1]), 1000)
member.start()
sys.stdin.readline()
numbers = [random.random() for _ in range(2_000_000)]  # a second or so, also on a fast machine
print("sorting", flush=True)
numbers.sort()
print("sorted", flush=True)
sys.stdin.readline()
os._exit(1)
"""


@contextlib.contextmanager
def member_elsewhere() -> Iterator[tuple[Hub, "subprocess.Popen[str]"]]:
    """Rank 0 here, with all the patience in the world, and rank 1 in a process of its own, with a witness."""
    hub = Hub(2, patience=1000)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", BUSY, str(hub.port)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            hub.witnesses = {1: int(process.stdout.readline())}
            hub.start()
            wait_for(lambda: hub.ticks[1] > 1)
            yield hub, process
        finally:
            process.kill()
            hub.close(failed=False)


def test_a_process_that_lets_no_thread_run_is_not_lost() -> None:
    asked = mock.Mock(side_effect=lines.state_at)
    with (
        mock.patch.object(lines, "_STOPPED_SECONDS", 0.1),
        mock.patch.object(lines, "state_at", asked),
        member_elsewhere() as (hub, process),
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "sorting\n"
        assert process.stdout.readline() == "sorted\n"
        assert asked.called  # it was silent for so long that its witness had to say what it does
        assert hub.lost(0) == []
        process.stdin.write("\n")
        process.stdin.flush()
        assert hub.lost(LONG) == [1]  # killed, it is lost at once, long before anyone's patience ends


def test_a_process_that_is_stopped_is_lost_long_before_patience_ends() -> None:
    with mock.patch.object(lines, "_STOPPED_SECONDS", 0.3), member_elsewhere() as (hub, process):
        process.send_signal(signal.SIGSTOP)
        assert hub.lost(LONG) == [1]


def test_one_that_was_stopped_and_goes_on_is_not_lost_when_it_is_busy_later() -> None:
    hub = Hub(2, patience=1000)
    hub._stopped[1] = 60.0  # asked when it had been silent for a minute
    assert hub._is_lost(1, heard=0.0, now=61.0)
    assert not hub._is_lost(1, heard=30.0, now=61.0)  # it ticked while its witness was asked
    assert not hub._is_lost(1, heard=100.0, now=190.0)  # busy now, and nobody has said that it is stopped
    hub._listener.close()


def test_many_witnesses_that_do_not_answer_hold_nothing_up() -> None:
    """As those of a host that has vanished: its processes are known by their connections meanwhile."""
    never = threading.Event()
    with (
        mock.patch.object(lines, "_STOPPED_SECONDS", 0.1),
        mock.patch.object(lines, "state_at", side_effect=lambda *_: never.wait(LONG)) as asked,
        world(5) as (hub, members),
    ):
        hub.witnesses = dict.fromkeys(range(1, 5), 1)
        for member in members[:3]:
            member._say = lambda _: None  # type: ignore[method-assign]
        wait_for(lambda: asked.call_count == 3)
        members[3]._line.socket.shutdown(socket.SHUT_RDWR)
        try:
            assert hub.lost(LONG / 2) == [4]
            assert asked.call_count == 3  # once each, until they answer
        finally:
            never.set()


def test_one_whose_witness_is_stopped_too_is_lost() -> None:
    """As in a container that was paused: the kernel still takes connections there."""
    with socket.create_server(("127.0.0.1", 0)) as silent, mock.patch.object(witness, "_ANSWERS_WITHIN", 0.2):
        port = silent.getsockname()[1]
        assert state_at("127.0.0.1", port) == STOPPED
    assert state_at("127.0.0.1", port) is None  # nobody there: nothing is known


def test_a_witness_ends_with_its_process() -> None:
    code = "from skv_dist.parallel.processes.witness import Witness; print(Witness().port, flush=True)"
    port = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    wait_for(lambda: state_at("127.0.0.1", port) is None)


def blocked_in_the_store(seconds: float) -> int:
    """Ticks that rank 0 hears of rank 1 while rank 1 waits for a key, as NCCL does when it makes a communicator."""
    import torch.distributed as dist

    from skv_dist.config.parallel import ParallelConfig
    from skv_dist.parallel.processes.heartbeat import Heartbeat

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    store = dist.distributed_c10d._get_default_store()
    with mock.patch.object(lines, "TICK_SECONDS", 0.02):
        heartbeat = Heartbeat(ParallelConfig())
        dist.barrier()
        heard = 0
        if dist.get_rank() == 0:
            assert isinstance(heartbeat.watch, Hub)
            store.get("rank 1 waits")
            before, deadline = heartbeat.watch.ticks[1], time.monotonic() + seconds
            while (heard := heartbeat.watch.ticks[1] - before) < 20 and time.monotonic() < deadline:
                time.sleep(0.01)
            store.set("go on", "")
        else:
            store.set("rank 1 waits", "")
            store.get("go on")
        dist.barrier()
        heartbeat.stop(failed=False)
        return heard


def test_ticks_go_on_while_the_groups_store_is_blocked(workers: Any) -> None:
    assert workers(2)(blocked_in_the_store, 60.0)[0] >= 20
