"""A transformer layer as a function (hidden, K/V it borrows) -> (hidden, K/V it lends)."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer

from skv_dist.config.model import ModelConfig
from skv_dist.model.attention import KV
from skv_dist.model.norm import norm_class
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
            norm: Any = norm_class(model)
            self.post_attention_norm = norm(self.config, width, eps)
            self.post_mlp_norm = norm(self.config, width, eps)
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
        attended = attended if bias is None else attended + bias
        hidden = self._add(self.self_attn_bda, self.post_attention_norm(attended), hidden)

        normed = self.pre_mlp_layernorm(hidden)
        if self.recompute_mlp_region and self.training:
            transformed = tensor_parallel.checkpoint(self._feed_forward, False, normed)
        else:
            transformed = self._feed_forward(normed)
        return self._add(self.mlp_bda, self.post_mlp_norm(transformed), hidden), own

    def _add(self, bias_dropout_add: Any, output: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """To the residual stream, [s, b, h]."""
        scaled = output if self.residual_scale == 1 else output * self.residual_scale
        add = bias_dropout_add(self.training, self.config.bias_dropout_fusion)
        return add((scaled, None), hidden, self.hidden_dropout)

    def _feed_forward(self, normed: torch.Tensor) -> torch.Tensor:
        """The MLP with its bias, which a recomputed region must not hand out: autograd would take the parameter for
        something that the region has made (docs/pitfalls.md)."""
        if self.compiled_swiglu:
            joint, bias = self.mlp.linear_fc1(normed)
            output, bias = self.mlp.linear_fc2(swiglu(joint if bias is None else joint + bias))
        else:
            output, bias = self.mlp(normed)
        return output if bias is None else output + bias
