"""Entry points of the installed commands: a `UserError`, or a file that cannot be used, is one line and exit code 2."""

import contextlib
import functools
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType

from skv_dist.errors import UserError
from skv_dist.parallel.processes.report import report_error, report_once

REFUSED = 2
INTERRUPTED, TERMINATED, UNREAD = 130, 143, 141  # as shells have them: of SIGINT, SIGTERM and SIGPIPE


class _TerminatedError(BaseException):
    """SIGTERM arrived: whoever has something half-made takes it away, as behind a Ctrl-C."""


def entry_point(main: Callable[[list[str]], int]) -> Callable[[], int]:
    """Turn ``main(argv) -> exit code`` into an entry point on which a `UserError` is one line and exit code 2.

    So is an error of the file system that names a file. Where whoever reads the output has left (``| head``), the
    command ends without a word.

    A process that sits in a collective beside a failed one would wait for its time-out, so once a process group
    exists the failing process leaves at once (`os._exit`), and its launcher ends the others.
    """

    @functools.wraps(main)
    def run() -> int:
        # On import Megatron-core lists every optional package that it did not find.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
        # DeepSpeed calls collectives by names that torch has deprecated.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        # Nobody writes in place into what a layer returns, of which FSDP warns wherever that is a view.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        # Checkpoint tools read and write in one process on purpose.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        _clean_up_behind_sigterm()
        try:
            code = main(sys.argv[1:])
            print(end="", flush=True)  # of which nothing comes where standard output is closed
            return code
        except UserError as error:
            code = REFUSED
            report_error(error)
        except BrokenPipeError:
            if not _reader_has_left():
                raise  # another pipe, such as one to a process of ours
            code = UNREAD
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds of it
        except OSError as error:
            if not isinstance(error.filename, str | bytes | os.PathLike):
                raise  # nothing that the user could look at: none, or the number of an open file
            code = REFUSED
            report_error(f"{os.fsdecode(error.filename)}: {error.strerror or error}")
        except KeyboardInterrupt:
            code = INTERRUPTED
            report_once("interrupted")
        except _TerminatedError:
            code = TERMINATED
            report_once("terminated")
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            print(end="", flush=True)
            os._exit(code)
        return code

    return run


def _reader_has_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    if sys.stdout is None:  # closed from the start
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are told without being asked for
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


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
