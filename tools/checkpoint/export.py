"""The fp32 weights of a checkpoint as safetensors, under the names that they have in the checkpoint."""

import shutil
from pathlib import Path

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import read_tensors, tensor_shapes
from skv_dist.files import new_folder

from ..weights import write_weights

_FILE_BYTES = 4 * 2**30
_MODEL = "model."  # begins the names of weights; the others are optimizer state


def export_weights(checkpoint: Path, out: Path) -> tuple[int, int]:
    """Write the folder ``out``; how many tensors and files. One tensor is in memory at a time."""
    shapes = {name: shape for name, shape in sorted(tensor_shapes(checkpoint).items()) if name.startswith(_MODEL)}
    exported_shapes = {name.removeprefix(_MODEL): shape for name, shape in shapes.items()}
    tensors = ((name.removeprefix(_MODEL), read_tensors(checkpoint, [name])[name]) for name in shapes)
    with new_folder(out) as folder:
        num_files = write_weights(folder, exported_shapes, "float32", _FILE_BYTES, tensors)
        shutil.copy(checkpoint / files.CONFIG, folder / files.CONFIG)
    return len(shapes), num_files
