"""``train.output_dir/run.lock``: one run at a time in a folder, and a folder that all its processes share."""

import contextlib
import datetime
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from skv_dist.errors import UserError
from skv_dist.files import write_synced
from skv_dist.parallel.processes.agree import first_error

LOCK = "run.lock"
_SHARED_WITHIN = 20.0  # seconds in which the other hosts must see what the first process wrote


class FolderLock:
    """Holds an output folder for this run. Collective.

    Raises:
        UserError: on all ranks alike: another run holds the folder, or a process does not see it.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._token = folder.absolute() / LOCK, secrets.token_hex(8)
        self._held = False
        error = None
        if dist.get_rank() == 0:
            try:
                self._take()
            except UserError as problem:
                error = str(problem)
            except OSError as problem:
                error = f"train.output_dir {folder} cannot be written: {problem.strerror}"
        self._agree(error)
        shared = [self._token, socket.gethostname()]
        dist.broadcast_object_list(shared)
        self._agree(None if self._sees(shared[0]) else _not_shared(self._file, shared[1]))

    def release(self) -> None:
        """Let the next run have the folder."""
        if self._held and _read(self._file).get("token") == self._token:
            self._file.unlink(missing_ok=True)
        self._held = False

    def _agree(self, error: str | None) -> None:
        if (agreed := first_error(error)) is not None:
            self.release()
            raise UserError(agreed)

    def _take(self) -> None:
        """Make the lock with its content at once; take over the one of a process that has ended."""
        own = self._file.with_name(f".{LOCK}.{self._token}")
        try:
            write_synced(own, json.dumps({**_this_process(), "token": self._token}) + "\n")
            while not self._held:
                try:
                    _link(own, self._file)
                    self._held = True
                except FileExistsError:
                    self._remove_if_left_behind()
        finally:
            own.unlink(missing_ok=True)

    def _remove_if_left_behind(self) -> None:
        holder = _read(self._file)
        if not holder:  # it is being written, or was cut off
            time.sleep(1)
            holder = _read(self._file)
        if holder and not _has_ended(holder):
            raise UserError(_in_use(self._file, holder))
        spare = self._file.with_name(f".{LOCK}.{self._token}.old")
        try:
            os.rename(self._file, spare)
        except FileNotFoundError:
            return  # another run was faster
        if _read(spare) != holder:  # and this is its lock
            _link(spare, self._file)
        spare.unlink()

    def _sees(self, token: str) -> bool:
        patience = time.monotonic() + _SHARED_WITHIN
        while True:
            with contextlib.suppress(OSError):
                if _read(self._file).get("token") == token:
                    return True
            if time.monotonic() > patience:
                return False
            time.sleep(0.1)


def _link(file: Path, name: Path) -> None:
    """Make ``name`` with the content of ``file``. Raises FileExistsError where there is one."""
    try:
        os.link(file, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with name.open("x", encoding="utf-8") as stream:
            stream.write(file.read_text(encoding="utf-8"))


def _not_shared(file: Path, first_host: str) -> str:
    return (
        f"train.output_dir {file.parent} is not one folder for all processes: rank {dist.get_rank()} on "
        f"{socket.gethostname()} does not see what rank 0 on {first_host} wrote there; choose a folder on a file "
        "system that all hosts share"
    )


def _in_use(file: Path, holder: dict[str, Any]) -> str:
    place = f"process {holder.get('pid')} on {holder.get('host')}"
    cure = "wait for it or choose another folder"
    if holder.get("host") != socket.gethostname():
        cure = f"if that run has ended, remove {file}; else {cure}"
    return f"train.output_dir {file.parent} is in use by {place}, which began at {holder.get('began')}: {cure}"


def _read(file: Path) -> dict[str, Any]:
    """Empty where there is none, or none that says who holds it."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "process": _process(os.getpid()),
        "job": _job(),
    }


def _process(pid: int) -> str | None:
    """What tells a process from others that had or will have its id: the boot and the tick that it began at.

    None where it cannot be told, "ended" where the process waits to be buried only.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else f"{boot} {fields[19]}"


def _job() -> list[str] | None:
    """A Slurm job and how often it was requeued."""
    number = os.environ.get("SLURM_JOB_ID")
    return None if number is None else [number, os.environ.get("SLURM_RESTART_COUNT", "0")]


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether it is certain that the process which wrote ``holder`` runs no more."""
    before, now = holder.get("job"), _job()
    if before and now and before[0] == now[0] and before[1] != now[1]:
        return True  # Slurm requeues a job once its processes are gone
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it is another user's
    except (KeyError, TypeError, ValueError):
        return False
    process = _process(int(holder["pid"]))
    return None not in (process, holder.get("process")) and process != holder["process"]
