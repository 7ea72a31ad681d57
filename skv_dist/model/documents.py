"""Attention that stops at document boundaries (``data.reset_attention``)."""

from functools import cache
from typing import Any

import torch


def document_mask(documents: torch.Tensor) -> Any:
    """Causal mask within documents: a bool tensor [b, 1, s, s] on a CPU, a flex attention `BlockMask` on a GPU.

    Args:
        documents: int64 [b, s], the number of the document that each token belongs to.
    """
    batch, length = documents.shape
    if documents.device.type == "cpu":
        same = documents[:, None, :, None] == documents[:, None, None, :]
        return same & torch.ones(length, length, dtype=torch.bool).tril()
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (documents[b, q] == documents[b, k])

    return create_block_mask(allowed, batch, None, length, length, device=documents.device)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention as attention

    return torch.compile(attention, dynamic=False)  # uncompiled, it would build the whole score matrix


def flex_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, grouped: bool, scale: float | None
) -> torch.Tensor:
    """[b, q, s, d] under a block mask, grouped queries without repeating heads."""
    return _compiled_flex()(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
