"""A transformer layer as a function (hidden, K/V it borrows) -> (hidden, K/V it lends)."""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer

from skv_dist.model.attention import KV


class RoutedLayer(TransformerLayer):
    """Megatron's pre-norm layer: its modules, walked in a forward of our own that carries K/V in the open.

    ``TransformerLayer.forward`` has no place for them, and differs between Megatron-core versions.
    """

    recompute_mlp_region = False  # set once by the chunk from train.recompute

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: torch.Tensor,
        mask: Any,
        borrowed: KV | None,
        read_by_others: bool,
    ) -> tuple[torch.Tensor, KV | None]:
        """hidden [s, b, h] (or [s/t, b, h]) -> the same shape, and this layer's own K/V if a later layer reads them."""
        attended, bias, own = self.self_attention(
            self.input_layernorm(hidden), rotary, mask, borrowed, read_by_others
        )
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        hidden = add((attended, bias), hidden, self.hidden_dropout)

        normed = self.pre_mlp_layernorm(hidden)
        if self.recompute_mlp_region and self.training:
            transformed, bias = tensor_parallel.checkpoint(self.mlp, False, normed)
        else:
            transformed, bias = self.mlp(normed)
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        return add((transformed, bias), hidden, self.hidden_dropout), own
