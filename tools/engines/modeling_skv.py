"""A decoder whose layers may share K/V, for Hugging Face transformers 5.17 to 5.23. Travels with the exported model.

Layer ``l`` attends to the K/V of layer ``config.kv_source_layers[l] <= l``. A layer that is its own source owns a
cache; any other has no key or value projection and no cache. Otherwise the layers are those of Llama (``qk_norm:
false``) or Qwen3 (``qk_norm: true``). Method: arXiv 2604.22782. Written by skv-dist.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, kv_retention=0.5)           # adaptive folders
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, kv_source_layers=[0, 0, ...])
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple

KV = tuple[torch.Tensor, torch.Tensor]


class SkvConfig(PreTrainedConfig):
    """Llama's fields and ``qk_norm``, ``kv_source_layers``, ``kv_weight_layers``, ``kv_retention``.

    ``kv_weight_layers`` lists the layers whose key and value projections the folder holds: only they can own a cache.
    ``kv_retention`` in (0, 1] replaces ``kv_source_layers`` by uniform groups of ``round(1 / kv_retention)`` layers.
    """

    model_type = "skv"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    qk_norm: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    kv_source_layers: list[int] | None = None
    kv_weight_layers: list[int] | None = None
    kv_retention: float | None = None

    def resolve_sharing(self) -> None:
        """Settle ``kv_source_layers``; called before layers are built, when overrides are in.

        Raises:
            ValueError: the map is not one, or needs projections that the folder does not hold.
        """
        layers = self.num_hidden_layers
        if self.kv_retention is not None:
            if not 0 < self.kv_retention <= 1:
                raise ValueError(f"kv_retention must lie in (0, 1], got {self.kv_retention}")
            group = min(layers, int(1 / self.kv_retention + 0.5))
            self.kv_source_layers = [layer - layer % group for layer in range(layers)]
            self.kv_retention = None
        if self.kv_source_layers is None:
            self.kv_source_layers = list(range(layers))
        if len(self.kv_source_layers) != layers:
            raise ValueError(f"kv_source_layers has {len(self.kv_source_layers)} entries for {layers} layers")
        for layer, source in enumerate(self.kv_source_layers):
            if not 0 <= source <= layer:
                raise ValueError(f"kv_source_layers[{layer}] is {source}, which is not one of 0..{layer}")
            if self.kv_source_layers[source] != source:
                raise ValueError(f"kv_source_layers[{layer}] is {source}, a layer that owns no cache itself")
        owners = sorted(set(self.kv_source_layers))
        missing = set(owners) - set(self.kv_weight_layers if self.kv_weight_layers is not None else owners)
        if missing:
            raise ValueError(
                f"layer {min(missing)} cannot own a cache: its key and value projections were left out when this "
                f"folder was exported, which holds those of layers {self.kv_weight_layers}; export with --adaptive"
            )
        self.kv_weight_layers = owners  # what this model will hold and save

    @property
    def sources(self) -> list[int]:
        return self.kv_source_layers or list(range(self.num_hidden_layers))

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """Read by transformers' caches from 5.23 on; older ones hold nothing for a layer that never updates them."""
        return [None if source == layer else "reuse" for layer, source in enumerate(self.sources)]


class SkvAttention(nn.Module):
    def __init__(self, config: SkvConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.owns_cache = config.sources[layer_idx] == layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        hidden, width = config.hidden_size, config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        if self.owns_cache:
            kv_width = config.num_key_value_heads * self.head_dim
            self.k_proj = nn.Linear(hidden, kv_width, bias=False)
            self.v_proj = nn.Linear(hidden, kv_width, bias=False)
            self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: KV,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        shared: KV | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, KV]:
        """``shared``: keys and values of the source, each [b, groups, s, d], for a layer that owns none."""
        shape = hidden_states.shape[:-1]
        query = self.q_norm(self.q_proj(hidden_states).view(*shape, -1, self.head_dim)).transpose(1, 2)
        if self.owns_cache:
            key = self.k_norm(self.k_proj(hidden_states).view(*shape, -1, self.head_dim)).transpose(1, 2)
            value = self.v_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
        else:
            assert shared is not None
            query, _ = apply_rotary_pos_emb(query, query[:, :1], *position_embeddings)
            key, value = shared
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out.reshape(*shape, -1).contiguous()), weights, (key, value)


class SkvDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SkvConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = SkvAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, KV]:
        attended, _, kv = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), kv


class SkvPreTrainedModel(PreTrainedModel):
    config_class = SkvConfig
    config: SkvConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SkvDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class SkvModel(SkvPreTrainedModel):
    def __init__(self, config: SkvConfig) -> None:
        config.resolve_sharing()
        super().__init__(config)
        # What an adaptive folder holds for layers that share. Of no other: vLLM's Transformers backend drops all that
        # is named here, whether the model has a place for it or not.
        shared = "|".join(str(layer) for layer, source in enumerate(config.sources) if source != layer)
        if shared:
            self._keys_to_ignore_on_load_unexpected = [rf"layers\.({shared})\.self_attn\.(k_proj|v_proj|k_norm)\."]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(SkvDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen).unsqueeze(0)  # type: ignore
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden, position_ids)
        sources = self.config.sources
        last_reader = {source: reader for reader, source in enumerate(sources)}
        lent: dict[int, KV] = {}
        every = [hidden]
        for index, layer in enumerate(self.layers):
            hidden, kv = layer(
                hidden,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                shared=lent.get(sources[index]),
                position_ids=position_ids,
                **kwargs,
            )
            if last_reader.get(index, index) > index:
                lent[index] = kv
            if last_reader[sources[index]] == index:
                lent.pop(sources[index], None)
            every.append(hidden)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*every[:-1], hidden) if output_hidden_states else None,
        )


class SkvForCausalLM(SkvPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SkvConfig) -> None:
        super().__init__(config)
        self.model = SkvModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


__all__ = ["SkvConfig", "SkvForCausalLM", "SkvModel", "SkvPreTrainedModel"]
