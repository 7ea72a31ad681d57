"""Norms for the local spec. Megatron's own wrapper refuses sequence parallelism; these mark their weights for it."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm over the last axis."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_device(config))
        _mark(self, config)


class LayerNorm(torch.nn.LayerNorm):
    """Mean-and-variance norm over the last axis, with bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_device(config))
        _mark(self, config)


def _device(config: TransformerConfig) -> torch.device | None:
    return None if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())


def _mark(module: torch.nn.Module, config: TransformerConfig) -> None:
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
