"""Attention whose scores are capped (``model.score_cap``), which torch's fused kernels do not know."""

import torch
import torch.nn.functional as F


def capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    cap: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention with scores cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118). All scores are in memory.

    Args:
        query: [b, q, s, d].
        key, value: [b, k, t, d]; k divides q.
        mask: bool [b or 1, 1, s, t], True where attention is allowed; None for causal.
        scale: factor on scores; None for 1 / sqrt(d).

    Returns:
        [b, q, s, d]
    """
    batch, heads, length, width = query.shape
    grouped = query.unflatten(1, (key.shape[1], -1))  # [b, k, q/k, s, d]
    scores = grouped @ key[:, :, None].transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    scores = cap * torch.tanh(scores / cap)  # [b, k, q/k, s, t]
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = F.dropout(scores.softmax(-1, dtype=wide).to(query.dtype), dropout)
    return (weights @ value[:, :, None]).reshape(batch, heads, length, width)
