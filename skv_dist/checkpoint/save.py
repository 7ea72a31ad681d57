"""Saving while training goes on, and reading back into any layout."""

import pickle
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.shards import Shards, empty_shards, restore, snapshot
from skv_dist.config.load import dump_config
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.parallel.engines.base import MODEL, MOMENTS, Engine
from skv_dist.training.callbacks import Callback, Metrics

_DCP = "torch.distributed.checkpoint"
_METADATA_CLASSES = {
    *(
        (f"{_DCP}.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that DCP's ``.metadata`` is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of the format")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, with the one unrestricted unpickling replaced."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _MetadataUnpickler(stream).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError("it is not the metadata of a checkpoint")
        except Exception as error:  # damaged pickles raise almost anything
            raise UserError(f"checkpoint {self.path} is damaged: .metadata cannot be read ({error})") from error
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def _agree(error: str | None, group: dist.ProcessGroup | None) -> str | None:
    """The first error of any rank, on all of them."""
    found: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, error, group=group)
    return next((text for text in found if text is not None), None)


def verify_everywhere(folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """`checkpoint_files.verify` with the files shared out over the ranks. Collective.

    Raises:
        UserError: on all ranks alike.
    """
    error = None
    try:
        files.verify(folder, dist.get_rank(group), dist.get_world_size(group))
    except (UserError, OSError) as problem:
        error = str(problem)
    agreed = _agree(error, group)
    if agreed is not None:
        raise UserError(agreed)


def load(engine: Engine, run: RunConfig, vocab_size: int, folder: Path, *, weights_only: bool) -> None:
    """Set the engine's weights, and its optimizer state too unless ``weights_only``. Collective.

    The layout that wrote the folder does not matter.

    Raises:
        UserError: a parameter is missing or has another shape, or a file is damaged.
    """
    whats: Sequence[str] = (MODEL,) if weights_only else (MODEL, *MOMENTS)
    if not weights_only:
        engine.prepare_moments()
    shards = empty_shards(engine, run, vocab_size, whats)
    error = None
    try:
        dcp.load(dict(shards), storage_reader=SafeReader(folder), no_dist=True)
    except UserError as problem:
        error = str(problem)
    except Exception as problem:  # DCP wraps what it meets in classes of its own
        error = f"checkpoint {folder} does not fit this model, or is damaged: {_reason(problem)}"
    agreed = _agree(error, None)
    if agreed is not None:
        raise UserError(agreed)
    restore(engine, shards, whats)
    if not weights_only:
        engine.updates = int(files.read_state(folder)["updates"])


class Saver:
    """Writes checkpoints of one run: a copy in memory at once, the files on a thread.

    Args:
        root: the folder of all checkpoints.
    """

    def __init__(self, engine: Engine, run: RunConfig, vocab_size: int, root: Path) -> None:
        self._engine, self._run, self._vocab_size, self._root = engine, run, vocab_size, root
        # Groups of its own: its collectives run beside those of training.
        self._group = dist.new_group(backend="gloo")
        self._rank = dist.get_rank()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="skv-checkpoint")
        self._pending: Future[None] | None = None
        self.saved_step: int | None = None  # of the last save that was begun

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin a checkpoint of ``step``; wait for the one before. Collective.

        A failure to write is reported and does not end the run; the checkpoint before stays.
        """
        self.wait()
        self.saved_step = step
        self._engine.prepare_moments()
        shards = snapshot(self._engine, self._run, self._vocab_size)
        state = {**state, "updates": self._engine.updates, "vocab_size": self._vocab_size}
        self._pending = self._pool.submit(self._write, step, shards, state)
        if not self._run.checkpoint.async_save:
            self.wait()

    def wait(self) -> None:
        """Until the save that was begun is done."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()
        dist.destroy_process_group(self._group)

    def _write(self, step: int, shards: dict[str, Shards], state: dict[str, Any]) -> None:
        folder = files.folder_of(self._root, step)
        error = None
        for action in (self._begin, self._tensors, self._finish):
            try:
                action(folder, shards, state)
            except Exception as problem:  # a full disk shows in many classes, DCP's among them
                error = _reason(problem)
            error = _agree(error, self._group)
            if error is not None:
                break
        if self._rank == 0:
            if error is None:
                print(f"saved {folder}", flush=True)
            else:
                shutil.rmtree(files.aside_of(folder), ignore_errors=True)
                print(f"step {step}: checkpoint {folder} could not be written ({error}); going on without", flush=True)

    def _begin(self, folder: Path, _: Any, state: dict[str, Any]) -> None:
        if self._rank == 0:
            aside = files.aside_of(folder)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            files.write_state(aside, state)
            files.write_synced(aside / files.CONFIG, dump_config(self._run))

    def _tensors(self, folder: Path, shards: dict[str, Shards], _: Any) -> None:
        writer = dcp.FileSystemWriter(files.aside_of(folder), sync_files=True)
        dcp.save(dict(shards), storage_writer=writer, process_group=self._group)

    def _finish(self, folder: Path, *_: Any) -> None:
        aside = files.aside_of(folder)
        mine = {path.name: files.digest(path) for path in aside.glob(f"__{self._rank}_*.distcp")}
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, mine, group=self._group)
        if self._rank == 0:
            manifest = {name: entry for part in everyone for name, entry in part.items()}
            manifest.update({path.name: files.digest(path) for path in aside.iterdir() if path.name not in manifest})
            files.publish(folder, manifest)
            files.prune(self._root, self._run.checkpoint.keep_last, self._run.checkpoint.keep_every)


def _reason(problem: BaseException) -> str:
    """The cause in one line."""
    for cause in (problem, problem.__cause__, problem.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    lines = [line for line in str(problem).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(problem).__name__


class Checkpoints(Callback):
    """Saves every so many steps, and adds the seconds that training stood still for it to the metrics."""

    def __init__(self, saver: Saver, every: int, state: Callable[[], dict[str, Any]]) -> None:
        self._saver, self._every, self._state = saver, every, state

    def on_step(self, step: int, metrics: Metrics) -> None:
        if self._every and step % self._every == 0:
            began = time.perf_counter()
            self._saver.save(step, self._state())
            metrics["checkpoint/stall_seconds"] = time.perf_counter() - began


def read_tensors(folder: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Full tensors by their names in the checkpoint, in one process without process groups.

    Raises:
        UserError: the folder is damaged.
    """
    reader = SafeReader(folder)
    metadata = reader.read_metadata().state_dict_metadata
    found = {name: torch.zeros(metadata[name].size) for name in names}  # type: ignore[union-attr]
    try:
        dcp.load(dict(found), storage_reader=reader, no_dist=True)
    except Exception as error:
        raise UserError(f"checkpoint {folder} is damaged: {_reason(error)}") from error
    return found


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint."""
    entries = SafeReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items()}  # type: ignore[union-attr]
