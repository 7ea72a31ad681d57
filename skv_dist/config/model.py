"""``model``: the shape of the transformer."""

import json
from typing import Literal

from pydantic import Field, model_validator

from skv_dist.config.blocks import BLOCK_STYLES, BlockStyle
from skv_dist.config.section import Section


class RopeScaling(Section):
    """Llama-3 frequency scaling; names and meaning as in transformers' ``rope_scaling``."""

    factor: float = Field(ge=1)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    original_max_position_embeddings: int = Field(default=8192, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> "RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be greater than low_freq_factor")
        return self


class ModelConfig(Section):
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int | None = Field(default=None, gt=0)
    vocab_size: int | None = Field(default=None, gt=0)
    make_vocab_size_divisible_by: int = Field(default=128, gt=0)
    max_position_embeddings: int = Field(default=32768, gt=0)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(default=1e-6, gt=0)
    activation: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    qk_norm: bool = False
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    block: Literal["llama", "gemma4"] = "llama"
    init_std: float = Field(default=0.02, gt=0)
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"

    @property
    def kv_channels(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def gated(self) -> bool:
        """Whether the MLP is gated: fused gate and up projections."""
        return self.activation in ("swiglu", "geglu")

    @property
    def block_style(self) -> BlockStyle:
        """What `block` does differently from the plain pre-norm block."""
        return BLOCK_STYLES[self.block]

    @model_validator(mode="after")
    def _block_is_whole(self) -> "ModelConfig":
        for key, needed in self.block_style.needs.items():
            if getattr(self, key) != needed:
                given, cure = getattr(self, key), json.dumps(needed)
                raise ValueError(f"block '{self.block}' does not go with {key} {given!r}: set {key}={cure}")
        if self.block_style.local_only and self.transformer_impl == "transformer_engine":
            raise ValueError(
                f"block '{self.block}' and transformer_impl 'transformer_engine' do not work together: set "
                "transformer_impl=local"
            )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}: set head_dim"
            )
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_kv_heads {self.num_kv_heads}"
            )
        if self.kv_channels % 2:
            raise ValueError(f"head_dim {self.kv_channels} is odd: rotary positions need an even one")
        return self
