"""Hosts on this one machine: Linux namespaces, each with a network, processes, a name and a /tmp of its own.

A host sees of the others their addresses and, where there is one, the folder that all share. It sees no other network:
there is no route out. All of it lives as long as the process that made it: each host hangs on a pipe from there, and
the kernel takes the network, the mounts and the processes away with the host's first process.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

NAMES = ("alder", "birch", "cedar", "dogwood")
REPOSITORY = Path(__file__).parents[2]
_NAMESPACES = {"net": 0x40000000, "uts": 0x04000000, "ipc": 0x08000000, "mnt": 0x00020000, "pid": 0x20000000}
# The first process of a host. It buries whatever is left to it, and ends with the pipe.
_INIT = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True); sys.stdin.read()"
# Folders that the host's own /tmp would hide are put aside first, and put back where they were.
_FURNISH = """
hostname "$1"
mount -t tmpfs -o mode=755 none /mnt
printf '%s' "$2" > /mnt/hosts
shift 2
number=0
for path; do
    number=$((number + 1))
    mkdir "/mnt/$number"
    mount --bind "$path" "/mnt/$number"
done
mount -t tmpfs none /tmp
mount -t tmpfs none /dev/shm
mount --bind /mnt/hosts /etc/hosts
number=0
for path; do
    number=$((number + 1))
    mkdir -p "$path"
    mount --bind "/mnt/$number" "$path"
    umount "/mnt/$number"
done
mkdir -p /tmp/home
ip link set lo up
"""


def address_of(number: int) -> str:
    """From a block that is set aside for documentation: no network of anybody has it."""
    return f"192.0.2.{number + 1}"


class _Namespaces:
    """A process that holds new namespaces open, of the kinds that ``unshare`` has options for."""

    def __init__(self, *kinds: str) -> None:
        options = [f"--{kind}" for kind in kinds]
        if "pid" in kinds:
            options += ["--fork", "--mount-proc"]
        pipe = subprocess.PIPE
        self._holder = subprocess.Popen(
            ["unshare", *options, sys.executable, "-S", "-c", _INIT], stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "up\n":
            raise OSError(self._holder.communicate()[1].strip())
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self.pid = int(children[0]) if children else self._holder.pid

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._holder.communicate()

    def within(self, *spaces: str) -> list[str]:
        """The beginning of a command that runs inside; ``spaces``: inside these only."""
        options = ["--mount" if space == "mnt" else f"--{space}" for space in spaces or _NAMESPACES]
        return ["nsenter", "--target", str(self.pid), *options]

    def run(self, script: str, *arguments: str, spaces: Sequence[str] = ()) -> str:
        """What a shell script prints inside. Raises AssertionError where it fails."""
        command = [*self.within(*spaces), "sh", "-euc", script, "sh", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}: {done.stderr}"
        return done.stdout


class Host(_Namespaces):
    """One host, as others reach it by ``name`` and ``address``."""

    def __init__(self, number: int, names: Mapping[str, str], seen: Sequence[Path]) -> None:
        super().__init__("net", "mount", "pid", "uts", "ipc")
        self.number, self.name, self.address = number, NAMES[number], address_of(number)
        table = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items())
        self.run(_FURNISH, self.name, table, *map(str, seen))

    @property
    def environment(self) -> dict[str, str]:
        """Variables that differ from host to host, or from those of the machine."""
        return {"HOME": "/tmp/home", "TMPDIR": "/tmp", "HOSTNAME": self.name}

    def popen(self, command: Sequence[str], environment: Mapping[str, str], output: IO[Any]) -> "subprocess.Popen[str]":
        """``command`` on this host, in a process group of its own; both streams go to ``output``."""
        return subprocess.Popen(
            [*self.within(), "env", f"--chdir={REPOSITORY}", *command],
            env={**os.environ, **environment, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
        )

    def signal_all(self, number: signal.Signals) -> None:
        """To every process of the host but its first, at one moment."""
        self.run(f"kill -s {number.name.removeprefix('SIG')} -- -1 || true", spaces=("pid",))

    def link(self, up: bool) -> None:
        """Pull the network cable out, or plug it in: nobody is told of what is lost."""
        self.run(f"ip link set eth0 {'up' if up else 'down'}", spaces=("net",))

    def throttle(self, rate: str, latency: str = "500ms") -> None:
        """Send no faster than ``rate``, as tc's token bucket has it."""
        self.run(f"tc qdisc replace dev eth0 root tbf rate {rate} burst 16kb latency {latency}", spaces=("net",))


@contextlib.contextmanager
def hosts(
    number: int, shared: Sequence[Path] = (), resolved: Callable[[str], str] | None = None
) -> Iterator[list[Host]]:
    """So many hosts, one network.

    Args:
        shared: folders that all of them see, at the same path. What is not below /tmp they share anyway.
        resolved: what a host's own name stands for on it, from its address; default: that address.
    """
    needed = map(Path.resolve, [REPOSITORY, *map(Path, sys.path), Path(sys.prefix), *shared])
    seen = [path for path in dict.fromkeys(needed) if Path("/tmp") in path.parents and path.exists()]
    with contextlib.ExitStack() as made:
        switch = _Namespaces("net")
        made.callback(switch.close)
        switch.run("ip link add switch type bridge; ip link set switch up", spaces=("net",))
        network = []
        for index in range(number):
            names = {NAMES[other]: address_of(other) for other in range(number)}
            if resolved:
                names[NAMES[index]] = resolved(address_of(index))
            host = Host(index, names, seen)
            made.callback(host.close)
            switch.run(
                f"ip link add port{index} type veth peer name eth0 netns {host.pid}; "
                f"ip link set port{index} master switch; ip link set port{index} up",
                spaces=("net",),
            )
            host.run(f"ip addr add {host.address}/24 dev eth0; ip link set eth0 up", spaces=("net",))
            network.append(host)
        yield network


@cache
def why_none() -> str | None:
    """Why hosts cannot be made here, as in a container without the right to; None where they can."""
    try:
        with hosts(2):
            return None
    except (OSError, AssertionError) as error:
        return f"no namespaces here: {error}"


def entering(host: Host) -> Callable[[], None]:
    """For `tests.support.processes.Command`: the process goes on on ``host``."""
    return partial(_enter, host.pid, host.environment)


def _enter(holder: int, environment: dict[str, str]) -> None:
    """Go on in the namespaces of process ``holder``.

    For a process with one thread. A process belongs to the namespace of ids in which it was made, so another one goes
    on there, and this one passes signals and the exit code on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.ExitStack() as opened:
        spaces = {name: opened.enter_context(open(f"/proc/{holder}/ns/{name}")) for name in _NAMESPACES}
        for name, kind in _NAMESPACES.items():
            if libc.setns(spaces[name].fileno(), kind) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
    child = os.fork()
    if child:
        _relay(child)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: not to outlive the one that relays
    os.environ.update(environment)
    tempfile.tempdir = None
    os.chdir(REPOSITORY)


def _relay(child: int) -> None:
    """Pass signals on to ``child``, and end as it ends."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
