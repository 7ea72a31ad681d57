"""A run over two hosts, made of namespaces on this machine; `tests/long` has every launcher and every fault."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.compare import TOLERANCE
from tests.support.hosts import Host, hosts, why_none
from tests.support.processes import ended, wait_until
from tests.support.runs import has_stepped, lines_of, losses, start, start_across
from tests.support.settings import run_settings

pytestmark = pytest.mark.skipif(why_none() is not None, reason=str(why_none()))
LISTENS = """
import socket, sys, time
open("/tmp/secret", "w").close()
servers = [socket.create_server(place) for place in (("127.0.0.1", 4000), (sys.argv[1], 4001))]
time.sleep(600)
"""
REACHES = """
import socket, sys
def reaches(address, port):
    try:
        socket.create_connection((address, int(port)), timeout=5).close()
        return True
    except OSError:
        return False
print([reaches(*place.split("/")) for place in sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def network(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    """Two hosts that share the folder in which the tests of this session write."""
    with hosts(2, shared=[tmp_path_factory.getbasetemp()]) as found:
        yield found


def test_a_host_sees_of_another_its_address_and_nothing_else(network: list[Host], tmp_path: Path) -> None:
    one, other = network
    with (tmp_path / "output").open("w") as output, socket.create_server(("127.0.0.1", 0)) as outside:
        process = one.popen([sys.executable, "-c", LISTENS, one.address], {}, output)
        try:
            here = ["127.0.0.1/4000", f"{one.address}/4001"]
            there = [*here, f"127.0.0.1/{outside.getsockname()[1]}"]
            look = [sys.executable, "-c", REACHES]
            while subprocess.run([*one.within(), *look, here[1]], capture_output=True, text=True).stdout != "[True]\n":
                assert process.poll() is None, (tmp_path / "output").read_text()
            seen = [
                subprocess.run([*host.within(), *look, *there], capture_output=True, text=True, check=True).stdout
                for host in network
            ]
            assert seen == ["[True, True, False]\n", "[False, True, False]\n"]
            assert [host.run("ls /tmp/secret 2>&1 | wc -w; hostname").split()[-1] for host in network] == [
                "alder",
                "birch",
            ]
            assert one.run("ls /tmp/secret").strip() == "/tmp/secret"
            with pytest.raises(AssertionError, match="No such file"):
                other.run("ls /tmp/secret")
            assert "/tmp/secret" in one.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
            assert "/tmp/secret" not in other.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
            assert other.run(f"ls -d {tmp_path}").strip() == str(tmp_path)  # which they share
        finally:
            one.signal_all(signal.SIGKILL)
            process.wait()


def settings(text: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, dict[str, Any]] = {
        "parallel": {"tensor": 2, "pipeline": 2},
        "model": {"num_layers": 4},
        "eval": {"every": 0},
        **sections,
    }
    return run_settings(text, out, **given)


def test_two_hosts_equal_one_process(network: list[Host], text: Path, tmp_path: Path) -> None:
    commands = start_across(network, tmp_path / "two.yaml", settings(text, tmp_path / "two"), 4)
    with ended(commands):
        assert [command.wait() for command in commands] == [0] * 4, [command.printed for command in commands]
    (alone,) = start(tmp_path / "one.yaml", settings(text, tmp_path / "one", parallel={"zero_stage": 0}))
    assert alone.wait() == 0, alone.printed
    found, expected = (losses(lines_of(tmp_path / name)) for name in ("two", "one"))
    assert len(found) == 6
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE)


def test_the_others_name_the_host_that_was_lost(network: list[Host], text: Path, tmp_path: Path) -> None:
    given = settings(text, tmp_path / "run", train={"steps": 100_000, "tensorboard": False})
    commands = start_across(network, tmp_path / "run.yaml", given, 4)
    with ended(commands):
        wait_until(lambda: has_stepped(tmp_path / "run"), commands)
        network[1].signal_all(signal.SIGKILL)
        assert [command.wait() for command in commands[:2]] == [2, 2], [command.printed for command in commands]
        places = [f"rank {rank} (stage 1, replica 0, tensor rank {rank - 2})" for rank in (2, 3)]
        line = f"error: contact was lost with {', '.join(places)} on birch; look at the output there"
        for command in commands[:2]:
            assert command.printed.count("error: ") == 1
            assert line in command.printed
