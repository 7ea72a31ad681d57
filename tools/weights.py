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
    item_bytes = DTYPES[dtype].itemsize
    shards = list(_shards(shapes, shard_bytes // item_bytes))
    remaining = iter(tensors)
    places = {}
    for number, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard, dtype, islice(remaining, len(shard)))
        places.update(dict.fromkeys(shard, file))
    assert next(remaining, None) is None
    if len(shards) > 1:
        num_bytes = item_bytes * sum(math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": num_bytes}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return len(shards)


def _shards(shapes: Shapes, max_elements: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """``shapes`` cut into runs of at most ``max_elements`` each, or of one tensor."""
    shard: dict[str, tuple[int, ...]] = {}
    num_elements = 0
    for name, shape in shapes.items():
        if shard and num_elements + math.prod(shape) > max_elements:
            yield shard
            shard, num_elements = {}, 0
        shard[name] = shape
        num_elements += math.prod(shape)
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
