"""Runs a function on N gloo processes that live for the whole test session.

Importing torch, Megatron and DeepSpeed takes seconds, so the processes are kept; each job makes its own
model-parallel groups inside the one world.
"""

import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

JOB_TIMEOUT = 150
MOST_THREADS = 400


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        CUDA_VISIBLE_DEVICES="",
    )
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # where it hangs, for the one who reads the log
    import warnings

    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    while True:
        job = pipe.recv()
        if job is None:
            return
        function, arguments = job
        try:
            pipe.send((True, function(*arguments)))
        except BaseException as error:
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
        gc.collect()  # engines lie in reference cycles and hold process groups, whose threads would add up


class JobFailedError(Exception):
    """A worker raised; ``kind`` is the name of its exception class."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(f"{kind}: {message}\n{trace}")
        self.kind, self.message = kind, message


class Workers:
    """``size`` processes; calling it runs ``function(*arguments)`` on all and returns their results by rank."""

    def __init__(self, size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.closed = False
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(JOB_TIMEOUT):
                self._print_stacks()
                self.close()
                for succeeded, answer in answers:
                    if not succeeded:  # which is why the others wait
                        raise JobFailedError(*answer)
                raise TimeoutError(f"rank {rank} gave no answer within {JOB_TIMEOUT} s")
            answers.append(pipe.recv())
        for succeeded, answer in answers:
            if not succeeded:
                raise JobFailedError(*answer)
        return [answer for _, answer in answers]

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
