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
from typing import Any

from tests.support.processes import HANGS_AFTER, fork, free_port, pipe, places

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
            answer = True, function(*arguments)
        except BaseException as error:
            answer = False, (type(error).__name__, str(error), traceback.format_exc())
        gc.collect()  # engines lie in reference cycles and hold process groups, whose threads would add up
        jobs.send((*answer, _is_worn()))


def _is_worn() -> bool:
    """Whether an engine has outlived its job: DeepSpeed keeps those of ZeRO-3, and jobs after it take twice as long."""
    engines = any(type(value).__name__ == "DeepSpeedZeroOptimizer_Stage3" for value in gc.get_objects())
    return engines or len(os.listdir("/proc/self/task")) > MOST_THREADS


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
        self.worn = False  # to be closed before the next job
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
            succeeded, answer, worn = jobs.recv()
            self.worn |= worn
            return succeeded, answer
        except EOFError:
            self.close()
            return False, ("EOFError", "a worker ended in the middle of a job", "")

    def _print_stacks(self) -> None:
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1)  # one after the other

    def close(self) -> None:
        self.closed = self.worn = True
        for process in self._processes:
            process.kill()


class Pools:
    """``pools(n)``: n processes, started at first use and kept while they are fit."""

    def __init__(self) -> None:
        self._pools: dict[int, Workers] = {}

    def __call__(self, size: int) -> Workers:
        if size in self._pools and self._pools[size].worn:
            self._pools.pop(size).close()
        if size not in self._pools:
            self._pools[size] = Workers(size)
        return self._pools[size]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
