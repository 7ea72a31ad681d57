"""Initial weights as a pure function of (seed, global parameter name).

Every layout, ZeRO stage and device starts from the same model: each parameter is drawn in full on the CPU, from a
generator of its own.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch

from skv_dist.config.model import ModelConfig

_BLOCK_ELEMENTS = 1 << 24  # drawn at once
_GENERATOR_BLOCK = 16  # torch draws normal numbers by so many


def initial_constant(name: str, model: ModelConfig) -> float | None:
    """The value of all elements of a parameter that is not drawn: norms begin with ones, biases with zeros, and so
    does the second matrix of an adapter, which thereby adds nothing.
    """
    if ".lora_B." in name:
        return 0.0
    if name.endswith("bias"):
        return 0.0
    return 1.0 - model.block_style.norm_offset if "norm" in name else None


def initial_rows(name: str, shape: Sequence[int], model: ModelConfig, seed: int) -> Iterator[torch.Tensor]:
    """A parameter that is drawn, float32, in blocks of some rows (`row_blocks`), so that it need not be held in full.

    Normal; the projections that write into the residual stream are scaled down by sqrt(2 x layers) (GPT-2, Radford et
    al. 2019; as Megatron-core does). The first matrix of an adapter is uniform as in peft, which takes torch's own rule
    for linear modules.
    """
    std = model.init_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * model.num_layers)
    digest = hashlib.sha256(f"skv-dist/init/{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    for rows in row_blocks(shape):
        if ".lora_A." in name:
            yield (2 * torch.rand((len(rows), *shape[1:]), generator=generator) - 1) / math.sqrt(shape[1])
            continue
        yield torch.randn((len(rows), *shape[1:]), generator=generator) * std


def row_blocks(shape: Sequence[int]) -> list[range]:
    """The rows that are drawn together. Blocks are whole numbers of what torch's generator draws at once, so that the
    values do not depend on their size."""
    width = math.prod(shape[1:])
    step = max(_GENERATOR_BLOCK, _BLOCK_ELEMENTS // width // _GENERATOR_BLOCK * _GENERATOR_BLOCK)
    starts = list(range(0, shape[0], step))
    if len(starts) > 1 and (shape[0] - starts[-1]) * width < _GENERATOR_BLOCK:
        starts.pop()  # torch draws fewer in another way
    return [range(start, end) for start, end in zip(starts, [*starts[1:], shape[0]])]
