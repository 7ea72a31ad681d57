"""Initial weights as a pure function of (seed, global parameter name).

Every layout, ZeRO stage and device starts from the same model: the full tensor is drawn on the CPU from a generator
of its own and cut to the rank's part, one parameter at a time.
"""

import hashlib
import math

import torch

from skv_dist.config.model import ModelConfig


def initial_value(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> torch.Tensor:
    """The full parameter, float32: norms one (biases zero), all else normal; the projections that write into the
    residual stream are scaled down by sqrt(2 x layers) (GPT-2, Radford et al. 2019; as Megatron-core does)."""
    if "norm" in name:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    std = model.init_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * model.num_layers)
    digest = hashlib.sha256(f"skv-dist/init/{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator) * std
