"""Weights in four or eight bits, as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them.

Blocks of 32 numbers along the input axis share a scale; a number is (code - zero) * scale, with the code in the
middle as ``zero``, so that the largest of a block is kept exactly.
"""

import numpy as np

from .weights import Array

BLOCK = 32
_ROWS = 4096  # quantized at once, so that no second copy of a whole embedding is made in float32


def bits_of(name: str) -> int:
    """In how many bits a folder of int4 keeps a weight.

    Whatever meets the vocabulary is kept in eight: the head of a small model costs about as much in four bits as all of
    its projections do (docs/engines.md).
    """
    if name.endswith("_proj.weight"):
        return 4
    return 8 if name in ("model.embed_tokens.weight", "lm_head.weight") else 32


def quantize(weight: Array, bits: int) -> tuple[Array, Array]:
    """Codes and scales of ``weight``, float32 [out, in].

    Returns:
        uint8 [out, blocks, BLOCK * bits / 8], of four bits two codes a byte, the first in its lower half; float32
        [out, blocks].
    """
    parts = [_quantize(weight[first : first + _ROWS], bits) for first in range(0, len(weight), _ROWS)]
    codes, scales = zip(*parts)
    return np.concatenate(codes), np.concatenate(scales)


def _quantize(weight: Array, bits: int) -> tuple[Array, Array]:
    zero = _zero(bits)
    blocks = _blocks(weight)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scales = extreme / -zero  # which gives the extreme the code 0, as there is no code 2 * zero
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(np.where(scales == 0, 0, blocks / scales)) + zero
    codes = codes.clip(0, 2 * zero - 1).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4 if bits == 4 else codes, scales[..., 0]


def rounded(weight: Array, bits: int) -> Array:
    """What the codes of ``weight`` stand for, float32 [out, in]."""
    codes, scales = quantize(weight, bits)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], BLOCK)
    values = (codes.astype(np.float32) - _zero(bits)) * scales[..., None]
    return values.reshape(len(weight), -1)[:, : weight.shape[1]]


def _zero(bits: int) -> int:
    """The code of 0, which the operators take where they are given no zero points."""
    return 1 << (bits - 1)


def _blocks(weight: Array) -> Array:
    """[out, in] -> [out, blocks, BLOCK], with zeros behind the last."""
    behind = -weight.shape[1] % BLOCK
    return np.pad(weight, ((0, 0), (0, behind))).reshape(len(weight), -1, BLOCK)
