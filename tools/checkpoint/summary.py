"""What a checkpoint is, in a few lines."""

import math
from pathlib import Path
from typing import Any

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import tensor_shapes


def summary(checkpoint: Path) -> dict[str, str]:
    """Lines by their label. The checkpoint has been verified."""
    state, manifest = files.read_state(checkpoint), files.read_manifest(checkpoint)
    sizes = [(checkpoint / name).stat().st_size for name in (*manifest, files.MANIFEST)]
    weights = [shape for name, shape in tensor_shapes(checkpoint).items() if name.startswith("model.")]
    return {
        "checkpoint": f"{checkpoint} (whole: sizes and SHA-256 agree with its manifest)",
        "step": f"{state['step']:,}, {state['samples']:,} samples, {state['updates']:,} updates",
        "written by": f"{state['software']}; {state['world_size']} processes, {_layout(state['layout'])}",
        "model": f"{sum(map(math.prod, weights)):,} parameters in {len(weights)} tensors",
        "on disk": f"{sum(sizes) / 2**20:,.1f} MiB in {len(sizes)} files",
    }


def _layout(settings: dict[str, Any]) -> str:
    """The settings of ``parallel`` that say something."""
    return ", ".join(f"{key} {value}" for key, value in settings.items() if value not in (None, False, 1, "deepspeed"))


def tensor_list(checkpoint: Path) -> list[str]:
    """Name and shape of every tensor, optimizer state included."""
    return [f"{name}  {list(shape)}" for name, shape in sorted(tensor_shapes(checkpoint).items())]
