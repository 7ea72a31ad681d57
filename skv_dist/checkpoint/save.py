"""Writing checkpoints while training goes on."""

import contextlib
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.metadata import DCP_ERRORS, cause_of
from skv_dist.checkpoint.shards import Shards, snapshot
from skv_dist.checkpoint.travelling import Files, write_travelling
from skv_dist.config.load import dump_config
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError, cause_in_one_line
from skv_dist.files import unfinished_path, write_synced
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.processes.agree import first_error

_LONGEST_WAIT = 300.0  # seconds for a save under way before a run ends with an error


class Saver:
    """Writes checkpoints of one run: a copy in memory at once, the files on a thread.

    Args:
        run: the complete configuration of the run.
        root: the folder of all checkpoints.
        travelling: further files of each checkpoint; read on the first rank.
    """

    def __init__(self, engine: Engine, run: RunConfig, root: Path, travelling: Files | None = None) -> None:
        self._engine, self._run, self._root, self._travelling = engine, run, root, travelling or {}
        # Groups of its own: its collectives run beside those of training.
        self._group = dist.new_group(backend="gloo")
        self._rank = dist.get_rank()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="skv-checkpoint")
        self._pending: Future[None] | None = None
        self.saved_step: int | None = None  # of the last checkpoint that is whole on disk
        self.failure: str | None = None  # of the last save, where it did not succeed

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin a checkpoint of ``step``; wait for the one before. Collective.

        A failure to write is reported and does not end the run; the checkpoint before stays, `failure` says why, and
        nothing half written is left.

        Args:
            state: what ``state.json`` keeps beside what the engine knows.
        """
        self.wait()
        self._engine.prepare_moments()
        shards = snapshot(self._engine, self._run)
        full_state = {**state, "updates": self._engine.num_updates, "vocab_size": self._run.vocab_size}
        self._pending = self._pool.submit(self._write, step, shards, full_state)
        if not self._run.checkpoint.async_save:
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Until the save that was begun is done, or for so many seconds."""
        if self._pending is None:
            return
        try:
            self._pending.result(seconds)
        except TimeoutError:
            return
        self._pending = None

    def finish_pending(self) -> None:
        """Give the save that was begun some time to end, where the run ends with an error."""
        if self._pending is not None:
            print(f"rank {self._rank} waits for the checkpoint that is being written", flush=True)
            with contextlib.suppress(Exception):  # the run ends with another error already
                self.wait(_LONGEST_WAIT)

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()
        dist.destroy_process_group(self._group)

    def _write(self, step: int, shards: dict[str, Shards], state: dict[str, Any]) -> None:
        """Three acts; after each all ranks learn whether it succeeded on every one."""
        folder = files.folder_of(self._root, step)
        acts = (
            lambda: self._begin(folder, state),
            lambda: write_tensors(folder, shards, self._group),
            lambda: self._publish(folder),
        )
        error = None
        for act in acts:
            try:
                act()
            except DCP_ERRORS as problem:  # a full disk shows in many classes
                error = cause_in_one_line(cause_of(problem))
            error = first_error(error, self._group)
            if error is not None:
                break
        self.failure = None if error is None else f"checkpoint {folder} could not be written ({error})"
        if error is None:
            self.saved_step = step
        if self._rank == 0:
            self._report(step, folder, state)

    def _begin(self, folder: Path, state: dict[str, Any]) -> None:
        if self._rank == 0:
            unfinished = unfinished_path(folder)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            files.write_state(unfinished, state)
            write_synced(unfinished / files.CONFIG, dump_config(self._run))
            write_travelling(unfinished, self._travelling)

    def _publish(self, folder: Path) -> None:
        unfinished = unfinished_path(folder)
        of_this_rank = {path.name: files.digest(path) for path in unfinished.glob(f"__{self._rank}_*.distcp")}
        of_all_ranks: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(of_all_ranks, of_this_rank, group=self._group)
        if self._rank == 0:
            manifest = {name: entry for entries in of_all_ranks for name, entry in entries.items()}
            others = [path for path in unfinished.rglob("*") if path.is_file() and path.name not in manifest]
            manifest.update({path.relative_to(unfinished).as_posix(): files.digest(path) for path in others})
            files.publish(folder, manifest)

    def _report(self, step: int, folder: Path, state: dict[str, Any]) -> None:
        if self.failure is not None:
            shutil.rmtree(unfinished_path(folder), ignore_errors=True)
            with contextlib.suppress(OSError):
                unfinished_path(self._root / files.LATEST).unlink()
            print(f"step {step}: {self.failure}; going on without", flush=True)
            return
        print(f"saved {folder}", flush=True)
        try:
            if (state.get("best") or {}).get("step") == step:
                files.set_best(self._root, step)
            files.prune(self._root, self._run.checkpoint.keep_last, self._run.checkpoint.keep_every)
        except (OSError, UserError) as problem:
            print(f"old checkpoints in {self._root} could not be deleted: {problem}", flush=True)


def write_tensors(folder: Path, shards: dict[str, Shards], group: dist.ProcessGroup) -> None:
    """Write what each rank stores into the unfinished form of ``folder``. Collective over ``group``."""
    writer = dcp.FileSystemWriter(unfinished_path(folder), sync_files=True)
    dcp.save(dict(shards), storage_writer=writer, process_group=group)


def write_alone(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write full tensors into ``folder``, in one process without process groups.

    Raises:
        UserError: what they are made from cannot be read.
        OSError: they cannot be written.
    """
    try:
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder, sync_files=True), no_dist=True)
    except DCP_ERRORS as problem:
        cause = cause_of(problem)
        if isinstance(cause, UserError):
            raise cause from problem
        raise OSError(cause_in_one_line(cause)) from problem
