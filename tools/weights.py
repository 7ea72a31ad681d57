"""Writing safetensors as the tensors come; `safetensors.torch.save_file` wants all of a file's in memory."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

Shapes = Mapping[str, tuple[int, ...]]


def write_weights(
    folder: Path, shapes: Shapes, dtype: str, shard_bytes: int, tensors: Iterable[tuple[str, torch.Tensor]]
) -> int:
    """One file, or several with an index, named as Hugging Face names them; the number of files.

    Args:
        shapes: of all tensors, in the order in which they are written.
        dtype: a key of `DTYPES`, to which tensors are cast.
        shard_bytes: a file is no larger, unless one tensor is.
        tensors: name and tensor in the order of ``shapes``; one is in memory at a time.
    """
    size = DTYPES[dtype].itemsize
    shards = list(_shards(shapes, shard_bytes // size))
    coming = iter(tensors)
    places = {}
    for number, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard, dtype, islice(coming, len(shard)))
        places.update(dict.fromkeys(shard, file))
    assert next(coming, None) is None
    if len(shards) > 1:
        total = size * sum(math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return len(shards)


def _shards(shapes: Shapes, most: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """``shapes`` cut into runs of at most ``most`` elements each."""
    shard: dict[str, tuple[int, ...]] = {}
    held = 0
    for name, shape in shapes.items():
        if shard and held + math.prod(shape) > most:
            yield shard
            shard, held = {}, 0
        shard[name] = shape
        held += math.prod(shape)
    yield shard


def _write_file(file: Path, shapes: Shapes, dtype: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), expected in zip(tensors, shapes, strict=True):
            assert (name, tuple(tensor.shape)) == (expected, shapes[name])
            stream.write(tensor.to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy().data)
