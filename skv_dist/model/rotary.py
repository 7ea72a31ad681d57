"""Rotary position frequencies, plain and with Llama-3 scaling."""

import math

import torch

from skv_dist.config.model import ModelConfig


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """float32 [d/2]: radians per position.

    Rotary positions: Su et al., arXiv 2104.09864. Llama-3 scaling: as transformers' ``_compute_llama3_parameters``
    defines it; wavelengths beyond the original context are stretched by ``factor``, short ones kept, and those
    between joined smoothly.
    """
    width = config.kv_channels
    exponents = torch.arange(0, width, 2, dtype=torch.int64).to(torch.float32) / width
    plain = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    # 0 at wavelengths that must be stretched, 1 at those that are kept
    smooth = (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    # In transformers' order of operations: other roundings of a frequency would be seen by `skv-convert verify`.
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def rotary_table(inverse: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """[2, s, 1, 1, d]: cosines and sines for `rotate`, computed in float32 and rounded to ``dtype`` once."""
    positions = torch.arange(length, device=inverse.device, dtype=torch.float32)
    angles = torch.outer(positions, inverse).repeat(1, 2)[:, None, None, :]  # [s, d/2] -> [s, 1, 1, d]
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotary positions of ``x`` [s, b, heads, d], over halves (not interleaved): the arithmetic of Megatron's
    ``apply_rotary_pos_emb``, which would take cosines and sines anew in every layer.
    """
    cosine, sine = table.unbind()
    first, second = x.chunk(2, dim=-1)  # [s, b, heads, d/2] each
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
