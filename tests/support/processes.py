"""Processes that start with all imports done.

Importing torch, Megatron and DeepSpeed costs six seconds of a core, and the tests start hundreds of processes. They are
forked from a server of `multiprocessing`, which has imported `tests.support.preload` once.
"""

import contextlib
import faulthandler
import importlib
import itertools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

# Seconds after which whatever a test waits for hangs. Nothing takes a tenth of it, even on a machine ten times slower.
HANGS_AFTER = 400
PRELOAD = "tests.support.preload"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([PRELOAD])


def fork(function: Callable[..., None], *arguments: Any, daemon: bool) -> ForkServerProcess:
    """``function(*arguments)`` in a new process. A daemon ends with this process, and may start no others."""
    process = _context.Process(target=_preloaded, args=(function, *arguments), daemon=daemon)
    process.start()
    return process


def pipe() -> Any:
    return _context.Pipe()


def _preloaded(function: Callable[..., None], *arguments: Any) -> None:
    importlib.import_module(PRELOAD)  # is there already, unless an import failed: the server does not say so
    function(*arguments)


# Below the ports that the system hands out by itself: gloo takes hundreds of those, also between the choice of a port
# here and the moment when a process listens on it. Each process of pytest begins elsewhere.
_ports = itertools.cycle(range(20000, 32000))
for _ in range(os.getpid() * 97 % 12000):
    next(_ports)


def free_port() -> int:
    while True:
        port = next(_ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def places(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher tells a process of its place."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Command:
    """``python -m module arguments``, or ``python script arguments``, in a process of its own.

    Its output goes to a file, that of stderr to another where one is given. ``first`` is called before anything else;
    ``enter`` before that, while the process has one thread, as who goes to another host needs it.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: Path,
        errors: Path | None = None,
        first: Callable[[], None] | None = None,
        enter: Callable[[], None] | None = None,
    ) -> None:
        self._output = output
        files = [str(output), str(errors or output)]
        for file in files:
            Path(file).write_text("")
        self._process = fork(_run, module, list(arguments), dict(environment), files, first, enter, daemon=False)

    @property
    def printed(self) -> str:
        """What it wrote so far."""
        return self._output.read_text(errors="replace")

    @property
    def returncode(self) -> int | None:
        """None while it runs, negative where a signal ended it."""
        return self._process.exitcode

    def wait(self) -> int:
        """Its exit status; an error that says where it hangs, if it does."""
        self._process.join(HANGS_AFTER)
        if self.returncode is None:
            self.send_signal(signal.SIGUSR1)
            self._process.join(5)  # to write its stacks
            self.send_signal(signal.SIGKILL)
            raise TimeoutError(f"no end within {HANGS_AFTER} s:\n{self.printed}")
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)


def _run(
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    files: list[str],
    first: Callable[[], None] | None,
    enter: Callable[[], None] | None,
) -> None:
    descriptors = [os.open(file, os.O_WRONLY | os.O_APPEND) for file in files]  # they lie on the tests' host
    if enter is not None:
        enter()
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    os.environ.update(environment)
    for number, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, number)
    faulthandler.register(signal.SIGUSR1, file=descriptors[0], all_threads=True)
    sys.argv = [module, *arguments]
    if first is not None:
        first()
    if module.endswith(".py"):
        sys.path.insert(0, str(Path(module).parent))
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_the_tests() -> None:
    """However those end: a run of a hundred thousand steps must not outlive them."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_forked(command: Sequence[str], env: Mapping[str, str], **_: Any) -> "subprocess.CompletedProcess[str]":
    """As ``subprocess.run([sys.executable, script, ...], capture_output=True, text=True, env=env)``."""
    python, script, *arguments = command
    assert python == sys.executable
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "stdout", Path(folder) / "stderr"
        code = Command(script, arguments, env, output, errors).wait()
        return subprocess.CompletedProcess(list(command), code, output.read_text(), errors.read_text())


@contextlib.contextmanager
def ended(commands: Sequence[Command]) -> Iterator[None]:
    """Kills afterwards whichever still runs, so that a test that fails leaves none behind."""
    try:
        yield
    finally:
        for command in commands:
            command.send_signal(signal.SIGKILL)


def wait_until(condition: Callable[[], bool], commands: Sequence[Command]) -> None:
    """Until ``condition()``, however long the machine takes; an error where a command ends before."""
    while not condition():
        for command in commands:
            assert command.returncode is None, command.printed
        time.sleep(0.05)
