"""Attention whose K/V may come from an earlier layer.

The routing point is behind the norms and rotary positions: what a layer lends is the object that a cache would hold
(docs/method.md). Megatron's `SelfAttention` gives the projections and the tensor-parallel split; only the walk through
them is ours, so that K/V are arguments and results instead of hidden state.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from skv_dist.config.model import ModelConfig
from skv_dist.model.capped import capped_attention
from skv_dist.model.gradients import keep_in_graph
from skv_dist.model.norm import AllHeadsNorm
from skv_dist.model.projection import QkvLinear
from skv_dist.model.rotary import rotate


@dataclass(frozen=True)
class KV:
    """Keys and values of one layer on this rank, each [s, b, k, d], after norms and rotary positions.

    Not a tuple: into tuples, lists and dicts ZeRO-3 looks for tensors to hang its hooks on. With K/V among them the
    number of hooks that fire would follow the route table, and replicas with other routes would fall out of step.
    """

    key: torch.Tensor
    value: torch.Tensor


class SdpaCoreAttention(MegatronModule):
    """Causal attention through ``torch.nn.functional.scaled_dot_product_attention``.

    Takes the place of Megatron's unfused core attention in the local spec: flash attention on a GPU, grouped queries
    without repeating heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.score_cap: float | None = None  # set by `RoutedSelfAttention.apply_style`

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None, **_: object
    ) -> torch.Tensor:
        """query [s, b, q, d], key and value [s, b, k, d] -> [s, b, q * d].

        ``attention_mask``: None for causal; a bool tensor [b, 1, s, s], True where attention is allowed; or a flex
        attention `BlockMask`.
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        grouped = query.shape[1] != key.shape[1]
        if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
            from skv_dist.model.documents import flex_attention

            out = flex_attention(query, key, value, attention_mask, grouped, self.softmax_scale, self.score_cap)
        elif self.score_cap is not None:
            dropout = self.dropout if self.training else 0.0
            with self._dropout_rng(dropout):
                out = capped_attention(query, key, value, attention_mask, self.softmax_scale, self.score_cap, dropout)
        else:
            dropout = self.dropout if self.training else 0.0
            with self._dropout_rng(dropout):
                out = F.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    attn_mask=attention_mask,
                    dropout_p=dropout,
                    is_causal=attention_mask is None,
                    scale=self.softmax_scale,
                    enable_gqa=grouped,
                )
        return out.permute(2, 0, 1, 3).flatten(2)  # [s, b, q * d]

    def _dropout_rng(self, dropout: float) -> Any:
        """Heads are split over tensor-parallel ranks: each drops on its own stream (with SP the chunk forks it)."""
        if dropout and not self.config.sequence_parallel:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()


class RoutedSelfAttention(SelfAttention):
    """Megatron's self-attention with K/V as explicit input and output. Works over the local and the TE spec."""

    # Set once by the chunk from train.recompute, not through Megatron's config: Megatron's own recompute region would
    # hold the borrowed K/V by closure, and their gradients would vanish without an error (docs/pitfalls.md).
    recompute_core = False
    value_norm_eps: float | None = None  # of a norm without weight on each head's values, where the block has one

    def apply_style(self, model: ModelConfig) -> None:
        """Make of plain attention that of the block that ``model`` describes."""
        if model.block_style.value_norm:
            self.value_norm_eps = model.norm_eps
        if model.score_factor is not None:
            self.core_attention.softmax_scale = model.score_factor
        if model.score_cap is not None:
            self.core_attention.score_cap = model.score_cap
        if model.block_style.qk_norm_over == "all_heads":
            width, eps = self.hidden_size_per_attention_head, model.norm_eps
            heads, groups = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
            self.q_layernorm = AllHeadsNorm(self.config, heads, width, eps, self.tp_group)
            self.k_layernorm = AllHeadsNorm(self.config, groups, width, eps, self.tp_group)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: torch.Tensor | None,
        mask: Any,
        borrowed: KV | None,
        lends: bool,
        extend: Callable[[KV], KV] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, KV | None]:
        """Attend to own or borrowed K/V.

        Args:
            hidden: [s, b, h], or [s/t, b, h] with sequence parallelism.
            rotary: see `skv_dist.model.rotary.rotary_table`; None where positions do not rotate.
            mask: see `SdpaCoreAttention`.
            borrowed: K/V of the source layer; None to use this layer's own.
            lends: whether a later layer reads this layer's own K/V.
            extend: (decoding) adds this layer's own K/V to those of earlier positions and returns all of them.

        Returns:
            Output of the projection (shape of ``hidden``), its bias if any, and this layer's own K/V if it lends
            them, with those of earlier positions where there is a cache.
        """
        if borrowed is not None and not lends and self._can_project_queries_alone():
            query, unread = self._queries_alone(hidden)
            own = None
        else:
            query, key, value = self.get_query_key_value_tensors(hidden)
            if self.value_norm_eps is not None:
                value = F.rms_norm(value, value.shape[-1:], eps=self.value_norm_eps)
            own = KV(rotate(key, rotary), value)
            if extend is not None:
                own = extend(own)
            unread = () if borrowed is None or lends else (own.key, own.value)
        query = rotate(query, rotary)
        used = borrowed or own
        assert used is not None
        if self.recompute_core and self.training:
            context = tensor_parallel.checkpoint(
                lambda q, k, v: self._core(q, k, v, mask), False, query, used.key, used.value
            )
        else:
            context = self._core(query, used.key, used.value, mask)
        output, bias = self.linear_proj(keep_in_graph(context, *unread))
        return output, bias, own if lends else None

    def _can_project_queries_alone(self) -> bool:
        """Not with Transformer Engine's projection, nor where several ranks share the rows of one group."""
        return isinstance(self.linear_qkv, QkvLinear) and self.config.num_query_groups >= self.world_size

    def _queries_alone(self, hidden: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Queries [s, b, q, d] where nobody reads this layer's K/V, and what must get a zero gradient."""
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        heads = self.num_attention_heads_per_partition
        rows, _ = self.linear_qkv(hidden, queries_only=(groups, heads // groups))
        query = rows.unflatten(-1, (heads, width))  # [s, b, q * d] -> [s, b, q, d]
        if not self.config.qk_layernorm:
            return query, ()
        # The norm of one key that is zero hands its weight the zero gradient. It must hang on an input with a gradient:
        # ZeRO-3 counts on the hook that it puts there, and replicas with other routes would fall out of step.
        return self.q_layernorm(query), (self.k_layernorm(0 * query[:1, :1, :groups]),)

    def _core(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
        return self.core_attention(
            query, key, value, mask, attn_mask_type=self.attn_mask_type, attention_bias=None, packed_seq_params=None
        )
