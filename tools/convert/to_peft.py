"""The adapters of a checkpoint as a folder of peft, which transformers loads on top of the base model."""

import json
from pathlib import Path

from safetensors.torch import save_file

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.frozen_model import config_of
from skv_dist.checkpoint.load import read_tensors, tensor_shapes
from skv_dist.checkpoint.travelling import origin_of
from skv_dist.errors import UserError
from skv_dist.model.adapter import is_adapter

from ..weights import DTYPES

_PARENT = {"gate": "mlp", "up": "mlp", "down": "mlp"}  # the others belong to self_attn


def to_peft(checkpoint: Path, out: Path, dtype: str | None = None) -> int:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into the folder ``out``.

    Args:
        dtype: a key of `DTYPES`; None: float32, as peft keeps adapters.

    Returns:
        The number of parameters in it.

    Raises:
        UserError: the checkpoint is damaged, or has no adapters.
    """
    files.verify(checkpoint)
    run = config_of(checkpoint)
    if not run.lora.rank:
        raise UserError(f"{checkpoint} has no adapters (lora.rank is 0): skv-convert to-hf exports the whole model")
    names = [name for name in tensor_shapes(checkpoint) if name.startswith("model.") and is_adapter(name)]
    stored = read_tensors(checkpoint, names)
    tensors = {_theirs(name): tensor.to(DTYPES[dtype or "float32"]).contiguous() for name, tensor in stored.items()}
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    origin = origin_of(checkpoint)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin.get("base_model", origin.get("folder")),
        "r": run.lora.rank,
        "lora_alpha": run.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(run.lora.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sum(tensor.numel() for tensor in tensors.values())


def _theirs(name: str) -> str:
    """``model.layers.3.mlp.linear_fc1.lora_A.up`` as peft calls it."""
    _, _, layer, _, _, matrix, part = name.split(".")
    parent = _PARENT.get(part, "self_attn")
    return f"base_model.model.model.layers.{layer}.{parent}.{part}_proj.{matrix}.weight"
