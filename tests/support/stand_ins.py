"""Stand-ins for ssh, pdsh, srun and scontrol that reach the hosts of `tests.support.hosts`, as scripts in a folder.

    python -S stand_ins.py ssh|pdsh|srun|scontrol ARGUMENTS

They run on the machine itself, as on a node from which jobs are sent, and know the hosts from SKV_TEST_HOSTS:
``name=id of its first process``, separated by blanks. As with the real ones, what was started through ssh or pdsh goes
on when these are killed; srun passes signals on.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HOSTS = dict(pair.split("=") for pair in os.environ.get("SKV_TEST_HOSTS", "").split())
SPACES = ("--net", "--mount", "--pid", "--uts", "--ipc")
# A login there has little of the environment here; that what is installed here is found, its profile sees to.
LOGIN = ("PATH", "PYTHONPATH", "LANG")


def started(host: str, command: Sequence[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    there = {**environment, "HOME": "/tmp/home", "TMPDIR": "/tmp", "HOSTNAME": host}
    return subprocess.Popen(["nsenter", "--target", HOSTS[host], *SPACES, *command], env=there)


def inner(process: "subprocess.Popen[bytes]") -> int:
    """The process on the host, which nsenter waits for."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else process.pid


def ssh(arguments: list[str]) -> int:
    while arguments[0].startswith("-"):
        arguments = arguments[2:]
    host, *command = arguments
    return started(host, ["sh", "-c", " ".join(command)], login()).wait()


def pdsh(arguments: list[str]) -> int:
    hosts: list[str] = []
    while arguments[0].startswith("-"):
        option = arguments.pop(0)
        if option in ("-f", "-w"):
            value = arguments.pop(0)
            hosts = value.split(",") if option == "-w" else hosts
    command = " ".join(arguments)
    remote = [
        started(host, ["sh", "-c", command.replace("%n", str(number))], login()) for number, host in enumerate(hosts)
    ]
    return max(process.wait() for process in remote)  # -S: the largest of the codes


def login() -> dict[str, str]:
    return {name: os.environ[name] for name in LOGIN if name in os.environ}


def srun(arguments: list[str]) -> int:
    tasks = []
    for number, host in enumerate(HOSTS):
        job = {"SLURM_NODEID": str(number), "SLURM_PROCID": str(number), "SLURM_STEP_NUM_TASKS": str(len(HOSTS))}
        tasks.append(started(host, arguments, {**os.environ, **job}))

    def forward(number: int, _: object) -> None:
        for task in tasks:
            with contextlib.suppress(OSError):
                os.kill(inner(task), number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    return max(task.wait() % 256 for task in tasks)


def scontrol(arguments: list[str]) -> int:
    assert arguments[:2] == ["show", "hostnames"], arguments
    print("\n".join(HOSTS))
    return 0


def scripts(folder: Path) -> None:
    """All of them, as commands in ``folder``."""
    for name in ("ssh", "pdsh", "srun", "scontrol"):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {name} "$@"\n')
        (folder / name).chmod(0o755)


if __name__ == "__main__":
    kinds = {"ssh": ssh, "pdsh": pdsh, "srun": srun, "scontrol": scontrol}
    raise SystemExit(kinds[sys.argv[1]](sys.argv[2:]))
