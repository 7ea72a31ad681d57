"""A transformer layer as a function (hidden, K/V it borrows) -> (hidden, K/V it lends)."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer

from skv_dist.config.blocks import BlockStyle
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

    def apply_style(self, style: BlockStyle, eps: float) -> None:
        """Make of the plain block the one that ``style`` describes.

        Args:
            eps: of the norms that the style adds.
        """
        if style.post_norms:
            self.post_attention_norm = RMSNorm(self.config, self.config.hidden_size, eps)
            self.post_mlp_norm = RMSNorm(self.config, self.config.hidden_size, eps)
        if style.value_norm:
            self.self_attention.value_norm_eps = eps
        if style.score_scale is not None:
            self.self_attention.core_attention.softmax_scale = style.score_scale

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: torch.Tensor,
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
        hidden = add((self.post_attention_norm(attended), bias), hidden, self.hidden_dropout)

        normed = self.pre_mlp_layernorm(hidden)
        if self.recompute_mlp_region and self.training:
            transformed, bias = tensor_parallel.checkpoint(self._feed_forward, False, normed)
        else:
            transformed, bias = self._feed_forward(normed)
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        return add((self.post_mlp_norm(transformed), bias), hidden, self.hidden_dropout), own

    def _feed_forward(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.compiled_swiglu:
            return self.mlp(normed)
        joint, _ = self.mlp.linear_fc1(normed)
        return self.mlp.linear_fc2(swiglu(joint))
