"""The routed transformer written down plainly in torch, one full-size weight after another. Only for tests."""

import math
from typing import Any

import torch

Weights = dict[str, torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """x [b, s, heads, d]: pairs (i, i + d/2) turned by position * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype)[None, :, None], angles.sin().to(x.dtype)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def routed_logits(weights: Weights, model: Any, tokens: torch.Tensor, table: tuple[int, ...]) -> torch.Tensor:
    """tokens [b, s] -> [b, s, v]. Layer l attends to the K/V that layer table[l] computed from its own input."""
    batch, length = tokens.shape
    width, groups = model.kv_channels, model.num_kv_heads
    per_group = model.num_attention_heads // groups
    hidden = weights["embedding.weight"][tokens]
    cache: list[tuple[torch.Tensor, torch.Tensor]] = []
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    for layer, source in enumerate(table):
        w = {n.removeprefix(f"layers.{layer}."): v for n, v in weights.items() if n.startswith(f"layers.{layer}.")}
        x = rms_norm(hidden, w["input_layernorm.weight"], model.norm_eps)
        fused = (x @ w["self_attention.linear_qkv.weight"].T).view(batch, length, groups, per_group + 2, width)
        query = fused[..., :per_group, :].reshape(batch, length, groups * per_group, width)
        key, value = fused[..., per_group, :], fused[..., per_group + 1, :]
        if model.qk_norm:
            query = rms_norm(query, w["self_attention.q_layernorm.weight"], model.norm_eps)
            key = rms_norm(key, w["self_attention.k_layernorm.weight"], model.norm_eps)
        query = rotate(query, model.rope_theta)
        cache.append((rotate(key, model.rope_theta), value))
        used_key, used_value = (t.repeat_interleave(per_group, dim=2) for t in cache[source])
        scores = torch.einsum("bqhd,bkhd->bhqk", query, used_key) / math.sqrt(width)
        weight = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", weight, used_value).flatten(2)
        hidden = hidden + attended @ w["self_attention.linear_proj.weight"].T
        x = rms_norm(hidden, w["pre_mlp_layernorm.weight"], model.norm_eps)
        gate, up = (x @ w["mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ w["mlp.linear_fc2.weight"].T
    hidden = rms_norm(hidden, weights["final_norm.weight"], model.norm_eps)
    return hidden @ weights.get("output_layer.weight", weights["embedding.weight"]).T
