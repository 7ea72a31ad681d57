"""Entry points of the installed commands: a `UserError` is one line and exit code 2."""

import contextlib
import functools
import hashlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from skv_dist.errors import UserError

REFUSED, INTERRUPTED, TERMINATED = 2, 130, 143  # the last two as shells have them


class _TerminatedError(BaseException):
    """SIGTERM arrived: whoever has something half-made takes it away, as behind a Ctrl-C."""


def entry_point(main: Callable[[list[str]], int]) -> Callable[[], int]:
    """Turn ``main(argv) -> exit code`` into an entry point on which a `UserError` is one line and exit code 2.

    A process that sits in a collective beside a failed one would wait for its time-out, so once a process group
    exists the failing process leaves at once (`os._exit`), and its launcher ends the others.
    """

    @functools.wraps(main)
    def run() -> int:
        # On import Megatron-core lists every optional package that it did not find.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
        # DeepSpeed calls collectives by names that torch has deprecated.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        # Checkpoint tools read and write in one process on purpose.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        _clean_up_behind_sigterm()
        try:
            return main(sys.argv[1:])
        except UserError as error:
            code = REFUSED
            report_once(f"{os.path.basename(sys.argv[0])}: error: {error}")
        except KeyboardInterrupt:
            code = INTERRUPTED
            report_once("interrupted")
        except _TerminatedError:
            code = TERMINATED
            report_once("terminated")
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            sys.stdout.flush()
            os._exit(code)
        return code

    return run


def _clean_up_behind_sigterm() -> None:
    owner = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a child that was forked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        signal.signal(number, signal.SIG_IGN)  # Slurm and torchrun may both send one: the second must not disturb
        raise _TerminatedError

    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, terminate)


def report_once(line: str) -> None:
    """Print why this process ends. Under torchrun the first of a host to say so prints it, and all tell torchrun.

    All processes of a host would print the same refusal. torchrun repeats in its summary what each process left in
    its error file, whose folder it keeps as long as the processes live.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    first = True
    if error_file:
        with contextlib.suppress(OSError):
            extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
            Path(error_file).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
        mark = Path(error_file).parent.parent / f"said.{hashlib.sha256(line.encode()).hexdigest()[:16]}"
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            first = False
        except OSError:  # better twice than never
            first = True
    if first:
        print(line, file=sys.stderr, flush=True)
