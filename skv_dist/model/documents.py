"""Attention that stops at document boundaries (``data.reset_attention``), or reaches back a window only."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch


def attention_mask(length: int, documents: torch.Tensor | None, window: int | None, device: torch.device) -> Any:
    """What `SdpaCoreAttention` takes as its mask: None where plain causal attention is meant, on a CPU a bool tensor
    [b or 1, 1, s, s], on a GPU a flex attention `BlockMask`.

    Args:
        documents: int64 [b, s], the number of the document that each token belongs to; None for one document.
        window: how many positions each one attends to, its own included; None for all before it.
    """
    window = None if window is None or window >= length else window
    if documents is None:
        return None if window is None else _window_mask(length, window, device)
    if device.type == "cpu":
        same = documents[:, None, :, None] == documents[:, None, None, :]
        return same & _within(length, window)

    def allowed(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        near = q >= k if window is None else (q >= k) & (q - k < window)
        return near & (documents[b, q] == documents[b, k])

    return _block_mask(allowed, documents.shape[0], length, device)


@lru_cache(maxsize=8)  # a run has a few, and asks at each micro-batch
def _window_mask(length: int, window: int, device: torch.device) -> Any:
    if device.type == "cpu":
        return _within(length, window)
    return _block_mask(lambda b, h, q, k: (q >= k) & (q - k < window), None, length, device)


def _within(length: int, window: int | None) -> torch.Tensor:
    """bool [1, 1, s, s]"""
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    return causal if window is None else causal.triu(1 - window)


def _block_mask(allowed: Callable[..., torch.Tensor], batch: int | None, length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(allowed, batch, None, length, length, device=device)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention as attention

    return torch.compile(attention, dynamic=False)  # uncompiled, it would build the whole score matrix


@cache
def _capped_scores(cap: float) -> Callable[..., torch.Tensor]:
    return lambda score, b, h, q, k: cap * torch.tanh(score / cap)


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    grouped: bool,
    scale: float | None,
    cap: float | None = None,
) -> torch.Tensor:
    """[b, q, s, d] under a block mask, grouped queries without repeating heads. ``cap``: ``model.score_cap``."""
    change = None if cap is None else _capped_scores(cap)
    return _compiled_flex()(query, key, value, score_mod=change, block_mask=mask, scale=scale, enable_gqa=grouped)
