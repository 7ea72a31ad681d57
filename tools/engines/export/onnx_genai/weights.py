"""Reading safetensors without torch, as maps of their files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

Array = npt.NDArray[Any]

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # numpy has no bfloat16


def map_weights(folder: Path) -> dict[str, Array]:
    """Every tensor of the folder; no bytes are read yet. bfloat16 comes as uint16.

    Raises:
        ValueError: there are none, a file is damaged, or a tensor has another type.
    """
    weights: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np"):  # which checks header and offsets; it has no bfloat16 to give
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: it cannot be read ({error})") from error
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        data = np.memmap(path, np.uint8, mode="r")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{path}: {name} is {entry['dtype']}; only {', '.join(_DTYPES)} can be converted")
            start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            weights[name] = data[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    if not weights:
        raise ValueError(f"{folder} holds no *.safetensors file")
    return weights


def float32(tensor: Array) -> Array:
    """What `map_weights` gave, as float32."""
    if tensor.dtype == np.uint16:  # bfloat16 is the upper half of a float32
        wide = tensor.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return tensor.astype(np.float32, copy=False)
