"""Norms for the local spec. Megatron's own wrapper refuses sequence parallelism; these mark their weights for it."""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from skv_dist.config.model import ModelConfig


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm over the last axis."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_device(config))
        _mark(self, config)


class OffsetRMSNorm(RMSNorm):
    """`RMSNorm` whose weights are counted from 1, as Gemma's: a weight of 0 leaves the normed numbers as they are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = 1.0 + self.weight.to(wide)
        return torch.nn.functional.rms_norm(x.to(wide), self.normalized_shape, weight, self.eps).to(x.dtype)


class LayerNorm(torch.nn.LayerNorm):
    """Mean-and-variance norm over the last axis, with bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_device(config))
        _mark(self, config)


def norm_class(model: ModelConfig) -> type[torch.nn.Module]:
    """Of all norms but `AllHeadsNorm`."""
    if model.norm == "layernorm":
        return LayerNorm
    return OffsetRMSNorm if model.block_style.norm_offset else RMSNorm


class AllHeadsNorm(torch.nn.Module):
    """Root-mean-square norm over all heads together, of which this rank has some: OLMo 2's q/k-norm.

    Args:
        heads: on this rank.
        width: of a head.
        group: the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, heads: int, width: int, eps: float, group: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(heads * width, dtype=config.params_dtype, device=_device(config)))
        self._eps, self._group = eps, group

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """[s, b, heads, d] -> the same shape and dtype"""
        states = heads.flatten(-2).to(torch.promote_types(heads.dtype, torch.float32))
        total = states.square().sum(-1, keepdim=True)
        if self._group.size() > 1:
            # Each rank's heads depend on the sum, so its gradient is summed over the ranks as the sum itself is.
            total = copy_to_tensor_model_parallel_region(
                reduce_from_tensor_model_parallel_region(total, group=self._group), group=self._group
            )
        mean = total / (states.shape[-1] * self._group.size())
        return (states * (mean + self._eps).rsqrt() * self.weight).to(heads.dtype).view(heads.shape)


def _device(config: TransformerConfig) -> torch.device | None:
    return None if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())


def _mark(module: torch.nn.Module, config: TransformerConfig) -> None:
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
