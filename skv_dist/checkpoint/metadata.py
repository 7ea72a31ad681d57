"""Reading DCP's format so that nothing in a checkpoint is executed.

DCP unpickles in three places. ``.metadata`` is read here by an unpickler that knows the format's classes only. Values
that ``.metadata`` calls bytes would be unpickled without any restriction: a checkpoint has none, so they are refused,
before anything is loaded and again by the planner that would be asked to. Tensors are read with ``weights_only``.
"""

import io
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from skv_dist.checkpoint import folder as files
from skv_dist.errors import UserError, cause_in_one_line

_DCP = "torch.distributed.checkpoint"
_CLASSES = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
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
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of the format")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, with its unrestricted unpickling of ``.metadata`` replaced."""

    _read: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._read is None:
            self._read = self._metadata()
        if self._read.storage_meta is not None:
            self._read.storage_meta.load_id = self.load_id
        return self._read

    def _metadata(self) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _MetadataUnpickler(stream).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError("it is not the metadata of a checkpoint")
            self._check(metadata)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        except Exception as error:  # damaged pickles raise almost anything
            cause = cause_in_one_line(error)
            raise UserError(f"checkpoint {self.path} is damaged: .metadata cannot be read ({cause})") from error
        return metadata

    def _check(self, metadata: Metadata) -> None:
        """Refuse whatever is not a plain tensor in a file that the manifest covers."""
        for name, entry in metadata.state_dict_metadata.items():
            if type(entry) is not TensorStorageMetadata:
                raise UserError(
                    f"checkpoint {self.path} is refused: .metadata calls {name!r} bytes, which torch would execute; "
                    "a checkpoint holds tensors only: do not use this one"
                )
        sealed = files.read_manifest(Path(self.path))
        for index, place in (metadata.storage_data or {}).items():
            if place.relative_path not in sealed or getattr(place, "transform_descriptors", None):
                raise UserError(
                    f"checkpoint {self.path} is refused: .metadata looks for {index.fqn!r} in {place.relative_path!r}, "
                    f"which is no plain file of its {files.MANIFEST}: do not use this one"
                )


class _TensorPlanner(DefaultLoadPlanner):
    """DCP's planner, with its unrestricted unpickling of bytes taken out, which leaves nothing unfilled.

    Args:
        folder: that is read, for messages.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def create_local_plan(self) -> LoadPlan:
        """DCP's plan, where it fills every element. DCP by itself leaves alone what no stored chunk holds.

        Raises:
            UserError: naming a tensor of which something is not stored, or is stored twice.
        """
        plan = super().create_local_plan()
        found: Counter[tuple[str, torch.Size | None]] = Counter()
        for item in plan.items:
            found[item.dest_index.fqn, item.dest_index.offset] += item.lengths.numel()
        assert self.metadata is not None
        for name, tensor in self.state_dict.items():
            if not isinstance(self.metadata.state_dict_metadata[name], TensorStorageMetadata):
                continue  # `load_bytes` refuses it
            for offsets, wanted in _chunks_of(tensor):
                if found[name, offsets] != wanted:
                    raise UserError(
                        f"checkpoint {self._folder} is damaged: .metadata knows where {found[name, offsets]} of "
                        f"{wanted} elements of {name!r} lie"
                    )
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UserError(f"{read_item.dest_index.fqn!r} is stored as bytes, which are not read")


def _chunks_of(tensor: torch.Tensor) -> Iterator[tuple[torch.Size, int]]:
    """Offsets and number of elements of each block that is read into."""
    if hasattr(tensor, "__create_chunk_list__"):
        for chunk in tensor.__create_chunk_list__():
            yield chunk.offsets, chunk.sizes.numel()
    else:
        yield torch.Size([0] * tensor.dim()), tensor.numel()


# DCP reports what went wrong on any rank by a class that is no Exception.
DCP_ERRORS = (Exception, CheckpointException)


def cause_of(problem: BaseException) -> BaseException:
    """The first error of any rank behind ``problem``, out of DCP's wrapping."""
    if isinstance(problem, CheckpointException) and problem.failures:
        return cause_of(problem.failures[min(problem.failures)][0])
    return problem


def read_into(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill ``tensors`` from ``folder``: the only way in which tensors of a checkpoint are read.

    Raises:
        UserError: the folder is damaged, does not hold them with their shapes, or is refused.
    """
    try:
        reader = SafeReader(folder)
        reader.read_metadata()  # what dcp.load finds wrong with it, torch logs with a traceback
        dcp.load(dict(tensors), storage_reader=reader, planner=_TensorPlanner(folder), no_dist=True)
    except DCP_ERRORS as problem:
        cause = cause_of(problem)
        if isinstance(cause, pickle.UnpicklingError):
            raise UserError(
                f"checkpoint {folder} is refused: something in it that is called a tensor is none, and torch might "
                "execute it: do not use this one"
            ) from problem
        if isinstance(cause, UserError):
            raise cause from problem
        if isinstance(cause, OSError):
            raise UserError(f"checkpoint {folder} cannot be read: {cause_in_one_line(cause)}") from problem
        raise UserError(
            f"checkpoint {folder} does not fit this model, or is damaged: {cause_in_one_line(cause)}"
        ) from problem
