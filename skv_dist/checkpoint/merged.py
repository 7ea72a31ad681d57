"""Weights of a checkpoint with what its adapters add."""

from pathlib import Path

import torch

from skv_dist.checkpoint.load import read_tensors, tensor_shapes
from skv_dist.config.run import RunConfig
from skv_dist.model.adapter import FUSED, added, rows_of


def read_weight(folder: Path, run: RunConfig, name: str) -> torch.Tensor:
    """A full weight by its global name, float32; where it has an adapter, the sum.

    Args:
        run: the configuration of the checkpoint.

    Raises:
        UserError: the folder is damaged.
    """
    stored, module = f"model.{name}", name.removesuffix(".weight")
    kind = module.rpartition(".")[2]
    if not run.lora.rank or kind not in FUSED:
        return read_tensors(folder, [stored])[stored]
    known = tensor_shapes(folder)
    wanted = {
        matrix: {part: f"model.{module}.{matrix}.{part}" for part in FUSED[kind]} for matrix in ("lora_A", "lora_B")
    }
    names = [full for parts in wanted.values() for full in parts.values() if full in known]
    tensors = read_tensors(folder, [stored, *names])
    a, b = ({part: tensors[full] for part, full in parts.items() if full in tensors} for parts in wanted.values())
    weight = tensors[stored]
    return weight + run.lora.scale * added(a, b, rows_of(kind, weight.shape[0], run), weight)
