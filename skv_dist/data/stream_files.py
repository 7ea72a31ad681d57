"""What a streamed source consists of, and which of it each lane reads in an epoch.

One process lists the files and tells the others, so that all deal out the same. An epoch is all files in a new order,
laid end to end and cut into equal shares, one for each lane: so lanes come to the end of an epoch at about the same
time, whatever the sizes of files are and however few there are.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from skv_dist.config.data import SourceConfig
from skv_dist.data.local_files import local_files
from skv_dist.data.order import shuffled
from skv_dist.data.read_part import Part, PlacedRow, part_rows
from skv_dist.data.sources import naming_dataset, with_columns
from skv_dist.errors import UserError

_HEADS = 256  # files of which the beginning is compared
_HEAD_BYTES = 1 << 16
_SHARD_PIECES = 1 << 20  # the size that stands for a shard of the hub, whose bytes nobody tells
_COMMIT = re.compile(r"@[0-9a-f]{40}")


@dataclass(frozen=True)
class Listing:
    """The files of a source.

    Attributes:
        names: of local files; of the hub, the numbers of shards.
        sizes: bytes of each, at least 1.
        content: hexadecimal digits that tell this source from another one, wherever it lies: from the names of its
            files below the folder that they have in common, their sizes, and the first 64 KiB of up to 256 of them. Of
            the hub: from the names of its files.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    content: str


def list_source(source: SourceConfig, cache_dir: str) -> Listing:
    """Look at a source that is to be streamed.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    if source.format == "hub":
        return _list_hub(source, cache_dir)
    files = local_files(source)
    try:
        sizes = [os.stat(file).st_size for file in files]
        content = _content_of(files, sizes)
    except OSError as error:
        raise UserError(f"data source '{error.filename}' cannot be read: {error.strerror}") from error
    return Listing(files, [max(1, size) for size in sizes], content)


def _content_of(files: Sequence[str], sizes: Sequence[int]) -> str:
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    digest = hashlib.sha256()
    for file, size in zip(files, sizes):
        digest.update(f"{os.path.relpath(file, root)}\0{size}\0".encode(errors="surrogateescape"))
    every = -(-len(files) // _HEADS)
    for file in files[::every]:
        with open(file, "rb") as stream:
            digest.update(hashlib.sha256(stream.read(_HEAD_BYTES)).digest())
    return digest.hexdigest()


def _list_hub(source: SourceConfig, cache_dir: str) -> Listing:
    with naming_dataset(source.path):
        builder = _hub_builder(source.path, source.name, cache_dir)
        files = (builder.config.data_files or {}).get(source.split, [])
        number = builder.as_streaming_dataset(split=source.split).num_shards
    names = [_COMMIT.sub("", str(file)) for file in files]
    if files and os.path.isdir(source.path):  # a folder in the form of a dataset, which may move
        root = os.path.commonpath([os.path.dirname(name) for name in names])
        names = [os.path.relpath(name, root) for name in names]
    described = "\0".join([source.name or "", source.split, str(number), *names])
    return Listing(
        [str(shard) for shard in range(number)],
        [_SHARD_PIECES] * number,
        hashlib.sha256(described.encode()).hexdigest(),
    )


@lru_cache(maxsize=16)
def _hub_builder(path: str, name: str | None, cache_dir: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset_builder(path, name, cache_dir=str(Path(cache_dir).expanduser()))


class StreamFiles:
    """Reads the parts of one source.

    Args:
        fields: of the rows that are read.

    Attributes:
        are_texts: whether each file is one text.
    """

    def __init__(self, source: SourceConfig, listing: Listing, fields: Sequence[str], cache_dir: str) -> None:
        self._source, self._fields, self._cache_dir = source, fields, cache_dir
        self._names, self._sizes = listing.names, np.asarray(listing.sizes, dtype=np.int64)
        self.are_texts = source.format == "text"

    def shares(self, epoch: int, lanes: int, seed: int | None) -> "Shares":
        """How the files are dealt out in an epoch; in their order where ``seed`` is None."""
        number = len(self._names)
        order = np.arange(number)
        if seed is not None:
            order = np.array([shuffled(i, number, seed, "files", epoch) for i in range(number)])
        return Shares(self._names, self._sizes[order], order, epoch, lanes)

    def rows(self, part: Part, cursor: int | None) -> Iterator[PlacedRow]:
        """The rows of a part, from its begin or behind a cursor.

        Raises:
            UserError: they cannot be read.
        """
        if self._source.format == "hub":
            return self._hub_rows(part, cursor)
        return part_rows(part, self._source.format, self._fields, cursor)

    @cached_property
    def _dataset(self) -> Any:
        builder = _hub_builder(self._source.path, self._source.name, self._cache_dir)
        return with_columns(builder.as_streaming_dataset(split=self._source.split), self._fields)

    def _hub_rows(self, part: Part, cursor: int | None) -> Iterator[PlacedRow]:
        """Of one shard. Where datasets knows its row groups, whole groups are dealt out and sought, else rows.

        A cursor is the number of the row group, shifted, and that of the row within it.
        """
        with naming_dataset(self._source.path):
            shard = self._dataset.shard(num_shards=len(self._names), index=int(part.file))
            groups = shard.reshard() if hasattr(shard, "reshard") else shard
            number = groups.num_shards
            first, end = part.within(number) if number > 1 else (0, 1)
            group, row = divmod(first << 32 if cursor is None else cursor, 1 << 32)
            while group < end:
                piece = groups.shard(num_shards=number, index=group) if number > 1 else groups
                for values in piece.skip(row) if row else piece:
                    row += 1
                    if number > 1 or part.holds(row - 1):
                        place = f"{row} of piece {group + 1} of shard {int(part.file) + 1}"
                        chosen = {field: values[field] for field in self._fields if field in values}
                        yield PlacedRow((group << 32) + row, place, chosen)
                group, row = group + 1, 0


class Shares:
    """The shares of one epoch.

    Args:
        sizes: int64 [files], in the order of this epoch.
        order: int64 [files], which file comes where.
    """

    def __init__(self, names: Sequence[str], sizes: np.ndarray, order: np.ndarray, epoch: int, lanes: int) -> None:
        self._names, self._sizes, self._order, self._epoch, self._lanes = names, sizes, order, epoch, lanes
        self._begins = np.concatenate([[0], np.cumsum(sizes)])

    def parts(self, lane: int) -> list[Part]:
        """What a lane reads. It takes another share in each epoch, so that in time each lane comes to all text."""
        share, whole = (lane + self._epoch) % self._lanes, int(self._begins[-1])
        begin, end = whole * share // self._lanes, whole * (share + 1) // self._lanes
        parts = []
        place = int(np.searchsorted(self._begins, begin, side="right")) - 1
        while place < len(self._sizes) and self._begins[place] < end:
            first, size = int(self._begins[place]), int(self._sizes[place])
            name = self._names[int(self._order[place])]
            parts.append(Part(name, max(begin - first, 0), min(end - first, size), size))
            place += 1
        return parts
