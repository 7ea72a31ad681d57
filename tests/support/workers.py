"""The pool: N gloo processes that live for the whole test session and run one job after another.

Each job makes its own model-parallel groups inside the one world.
"""

import faulthandler
import gc
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.support.processes import fork, free_port, pipe, places

# Seconds without any answer after which a job hangs. No job takes a tenth of it, even on a machine ten times slower.
HANGS_AFTER = 900
GRACE = 60  # for the others, once one has failed: they may wait for it in a collective
MOST_THREADS = 400


def _serve(rank: int, size: int, port: int, jobs: Connection) -> None:
    os.environ.update(places(rank, size, port))
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # where it hangs, for the one who reads the log
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = jobs.recv()
        except EOFError:  # the tests are over
            os._exit(0)
        try:
            jobs.send((True, function(*arguments)))
        except BaseException as error:
            jobs.send((False, (type(error).__name__, str(error), traceback.format_exc())))
        gc.collect()  # engines lie in reference cycles and hold process groups, whose threads would add up


class JobFailedError(Exception):
    """A worker raised; ``kind`` is the name of its exception class."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(f"{kind}: {message}\n{trace}")
        self.kind, self.message = kind, message


class Workers:
    """``size`` processes; calling it runs ``function(*arguments)`` on all and returns their results by rank."""

    def __init__(self, size: int) -> None:
        port = free_port()
        self.closed = False
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = pipe()
            self._processes.append(fork(_serve, rank, size, port, theirs, daemon=True))
            theirs.close()
            self._pipes.append(ours)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for jobs in self._pipes:
            jobs.send((function, arguments))
        answers: dict[int, Any] = {}
        failed: list[Any] = []
        while len(answers) < len(self._pipes):
            waiting = [jobs for rank, jobs in enumerate(self._pipes) if rank not in answers]
            ready = wait(waiting, GRACE if failed else HANGS_AFTER)
            if not ready:
                break
            for jobs in ready:
                succeeded, answer = self._answer(jobs)
                answers[self._pipes.index(jobs)] = answer
                if not succeeded:
                    failed.append(answer)
        if len(answers) < len(self._pipes):
            self._print_stacks()
            self.close()
        if failed:
            raise JobFailedError(*failed[0])
        if self.closed:
            raise TimeoutError(f"only ranks {sorted(answers)} answered within {HANGS_AFTER} s")
        return [answers[rank] for rank in range(len(self._pipes))]

    def _answer(self, jobs: Connection) -> tuple[bool, Any]:
        try:
            return jobs.recv()
        except EOFError:
            self.close()
            return False, ("EOFError", "a worker ended in the middle of a job", "")

    @property
    def worn(self) -> bool:
        """Whether to start afresh: what DeepSpeed keeps of a ZeRO-3 engine holds process groups and their threads."""
        tasks = Path(f"/proc/{self._processes[0].pid}/task")
        return self.closed or (tasks.exists() and len(list(tasks.iterdir())) > MOST_THREADS)

    def _print_stacks(self) -> None:
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1)  # one after the other

    def close(self) -> None:
        self.closed = True
        for process in self._processes:
            process.kill()
