"""Weights in four bits, as ONNX Runtime's MatMulNBits reads them.

Blocks of 32 numbers along the input axis share a scale; a number is (code - 8) * scale, code from 0 to 15, so that
the largest of a block is kept exactly.
"""

import numpy as np

from .weights import Array

BLOCK = 32
_ZERO = 8  # the code of 0, which MatMulNBits takes where it is given no zero points


def quantize(weight: Array) -> tuple[Array, Array]:
    """Codes and scales of ``weight``, float32 [out, in].

    Returns:
        uint8 [out, blocks, BLOCK / 2], two codes a byte, the first in its lower half; float32 [out, blocks].
    """
    blocks = _blocks(weight)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scales = extreme / -_ZERO  # which gives the extreme the code 0, as there is no code 16
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(np.where(scales == 0, 0, blocks / scales)) + _ZERO
    codes = codes.clip(0, 15).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales[..., 0]


def rounded(weight: Array) -> Array:
    """What the codes of ``weight`` stand for, float32 [out, in]."""
    packed, scales = quantize(weight)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], BLOCK)
    values = (codes.astype(np.float32) - _ZERO) * scales[..., None]
    return values.reshape(len(weight), -1)[:, : weight.shape[1]]


def _blocks(weight: Array) -> Array:
    """[out, in] -> [out, blocks, BLOCK], with zeros behind the last."""
    behind = -weight.shape[1] % BLOCK
    return np.pad(weight, ((0, 0), (0, behind))).reshape(len(weight), -1, BLOCK)
