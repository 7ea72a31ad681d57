"""Why a process ends, said once on each host: all of its processes would print the same line."""

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

_LONGEST = 4000  # characters of an error


def report_error(message: object) -> None:
    """As `report_once`, in the form that all errors of a command have."""
    report_once(f"{os.path.basename(sys.argv[0])}: error: {_shortened(printable(str(message)))}")


def _shortened(line: str) -> str:
    """Without its middle where somebody's data made it longer than anybody reads."""
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def printable(text: str) -> str:
    """``text`` as one line without control characters, which would forge lines or steer a terminal.

    Names in it come from files of other people. A character that cannot be shown stands by its escape, as in Python.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def report_once(line: str) -> None:
    """Print why this process ends. Under a launcher the first of a host to say so prints it, and all tell torchrun.

    torchrun repeats in its summary what each process left in its error file.
    """
    _tell_torchrun(line)
    mark = _mark_of(hashlib.sha256(line.encode()).hexdigest()[:16])
    first = True
    if mark is not None:
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            first = False
        except OSError:  # better twice than never
            first = True
    if first:
        print(line, file=sys.stderr, flush=True)


def _tell_torchrun(line: str) -> None:
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
            Path(error_file).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))


def _mark_of(digest: str) -> Path | None:
    """A file that the first of the processes makes which one launcher has started on this host; None without one.

    torchrun has a folder for the error files, which it keeps as long as the processes live. deepspeed has none: the
    mark lies among the temporary files, and the next one that lies there takes it away once the launcher is gone.
    """
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        return Path(error_file).parent.parent / f"said.{digest}"
    if "CROSS_RANK" not in os.environ or int(os.environ.get("LOCAL_SIZE") or 1) < 2:  # as deepspeed's launcher sets
        return None
    folder = Path(tempfile.gettempdir())
    for old in folder.glob("skv-said.*.*.*"):
        launcher = re.fullmatch(r"skv-said\.(\d+)\.(\d+)\.\w+", old.name)
        if launcher and _began(int(launcher[1])) != launcher[2]:
            with contextlib.suppress(OSError):
                old.unlink()
    began = _began(os.getppid())
    return None if began is None else folder / f"skv-said.{os.getppid()}.{began}.{digest}"


def _began(pid: int) -> str | None:
    """The tick of the clock at which a process began, which with its id tells it from all others of this host."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
