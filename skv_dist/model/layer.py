"""A transformer layer as a function (hidden, K/V it borrows) -> (hidden, K/V it lends)."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer

from skv_dist.config.model import ModelConfig
from skv_dist.model.attention import KV
from skv_dist.model.norm import RMSNorm
from skv_dist.model.swiglu import swiglu


class RoutedLayer(TransformerLayer):
    """Megatron's pre-norm layer: its modules, walked in a forward of our own that carries K/V in the open.

    ``TransformerLayer.forward`` has no place for them, and differs between Megatron-core versions.
    """

    # Set once by the chunk.
    recompute_mlp_region = False  # from train.recompute
    compiled_swiglu = False  # whether `skv_dist.model.swiglu` takes the place of Megatron's activation

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Norms of what attention and MLP add to the residual stream, where the block has them (`apply_style`).
        self.post_attention_norm: torch.nn.Module = torch.nn.Identity()
        self.post_mlp_norm: torch.nn.Module = torch.nn.Identity()
        self.residual_scale = 1.0

    def apply_style(self, model: ModelConfig) -> None:
        """Make of the plain block the one that ``model`` describes."""
        style, eps, width = model.block_style, model.norm_eps, self.config.hidden_size
        if not style.norms_before:
            self.input_layernorm = self.pre_mlp_layernorm = torch.nn.Identity()
        if style.norms_behind:
            self.post_attention_norm = RMSNorm(self.config, width, eps)
            self.post_mlp_norm = RMSNorm(self.config, width, eps)
        self.residual_scale = model.residual_scale
        self.self_attention.apply_style(model)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: torch.Tensor | None,
        mask: Any,
        borrowed: KV | None,
        lends: bool,
        extend: Callable[[KV], KV] | None = None,
    ) -> tuple[torch.Tensor, KV | None]:
        """hidden [s, b, h] (or [s/t, b, h]) -> the same shape, and this layer's own K/V if it lends them.

        Arguments: see `RoutedSelfAttention.forward`.
        """
        normed = self.input_layernorm(hidden)
        attended, bias, own = self.self_attention(normed, rotary, mask, borrowed, lends, extend)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        hidden = add(self._addend(self.post_attention_norm, attended, bias), hidden, self.hidden_dropout)

        normed = self.pre_mlp_layernorm(hidden)
        if self.recompute_mlp_region and self.training:
            transformed, bias = tensor_parallel.checkpoint(self._feed_forward, False, normed)
        else:
            transformed, bias = self._feed_forward(normed)
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        return add(self._addend(self.post_mlp_norm, transformed, bias), hidden, self.hidden_dropout), own

    def _addend(
        self, norm: torch.nn.Module, output: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What goes to the residual stream: an output [s, b, h], and a bias that Megatron adds to it."""
        if bias is not None and not (isinstance(norm, torch.nn.Identity) and self.residual_scale == 1):
            output, bias = output + bias, None  # norm and scale are of the sum
        normed = norm(output)
        return (normed if self.residual_scale == 1 else normed * self.residual_scale), bias

    def _feed_forward(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.compiled_swiglu:
            return self.mlp(normed)
        joint, bias = self.mlp.linear_fc1(normed)
        joint = joint if bias is None else joint + bias
        return self.mlp.linear_fc2(swiglu(joint))
