"""``model``: the shape of the transformer."""

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from skv_dist.config.blocks import BLOCK_STYLES, OPTIONS, BlockStyle
from skv_dist.config.rope import RopeScaling
from skv_dist.config.section import Section

Layer = Annotated[int, Field(ge=0)]


class LayerKind(NamedTuple):
    """What must agree between two layers for one to read the K/V of the other."""

    is_sliding: bool
    has_rope: bool

    def __str__(self) -> str:
        return f"{'sliding' if self.is_sliding else 'full'} attention{'' if self.has_rope else ' without rotary'}"


class ModelConfig(Section):
    """The shape of the transformer. It belongs to the weights: a run goes on from a checkpoint of the same shape only,
    and skv-convert writes it into exported models. configs/models holds the shapes of well-known models."""

    num_layers: int = Field(gt=0, examples=[8])
    """Number of transformer layers. They must split evenly over the stages of parallel.pipeline, or as
    parallel.first_stage_layers and parallel.last_stage_layers say."""

    hidden_size: int = Field(gt=0, examples=[96])
    """Width of the residual stream."""

    ffn_hidden_size: int = Field(gt=0, examples=[256])
    """Width inside the MLP. With a gated activation it is the width of the gate and of the up projection each. A
    multiple of parallel.tensor."""

    num_attention_heads: int = Field(gt=0, examples=[4])
    """Number of query heads. A multiple of num_kv_heads and of parallel.tensor."""

    num_kv_heads: int = Field(gt=0, examples=[2])
    """Number of key/value heads. With fewer than num_attention_heads, several query heads read one of them
    (grouped-query attention). May be smaller than parallel.tensor, whose ranks then hold copies; one of the two must
    divide the other."""

    head_dim: int | None = Field(default=None, gt=0)
    """Width of one attention head. Even, because rotary positions turn pairs. null: hidden_size / num_attention_heads,
    which must come out even and whole."""

    vocab_size: int | None = Field(default=None, gt=0)
    """Number of tokens that the model knows. null: as many as data.tokenizer has. A larger number is allowed, as
    published models have rows that no token uses; a smaller one is refused."""

    make_vocab_size_divisible_by: int = Field(default=128, gt=0)
    """Rows of embedding and head are padded to a multiple of this times parallel.tensor. Padding rows take no part in
    the loss, and checkpoints do not hold them, so this may change between two parts of a run."""

    max_position_embeddings: int = Field(default=32768, gt=0)
    """Longest context in tokens that the model is meant for. Training reads it as the upper limit of
    data.sequence_length only; skv-convert writes it into exported models, whose engines size their buffers by it."""

    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Norm in front of attention, MLP and head. Only rmsnorm can be exported.

    - rmsnorm: divides by the root of the mean square, with a weight.
    - layernorm: subtracts the mean and divides by the deviation, with a weight and a bias."""

    norm_eps: float = Field(default=1e-6, gt=0)
    """Number added under the root in all norms."""

    activation: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    """Activation of the MLP. skv-convert exports swiglu, and geglu with blocks gemma and gemma4.

    - swiglu: SiLU(gate) times up.
    - geglu: GELU(gate) times up, GELU in its tanh approximation.
    - gelu: GELU without a gate."""

    qk_norm: bool = False
    """Norm on the queries and keys before rotary positions. Of each head, as Qwen3 has, or of all heads together where
    the block says so."""

    biases: list[Literal["qkv", "attention_output", "mlp"]] = []
    """Projections that have a bias.

    - qkv: those of queries, keys and values, as in Qwen2.
    - attention_output: the one behind attention.
    - mlp: all of the MLP."""

    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies. A larger one gives longer wavelengths."""

    rope_scaling: RopeScaling | None = None
    """Rotary frequencies stretched to a longer context. null: they follow from rope_theta alone. Not
    with block gemma4."""

    no_rope_layers: list[Layer] = []
    """Layers without rotary positions, as SmolLM3 has. They share K/V among themselves only, as do the others."""

    sliding_window: int | None = Field(default=None, gt=0)
    """How many tokens a layer of sliding_layers attends to, its own included. null: all before it."""

    sliding_layers: list[Layer] = []
    """Layers that attend to the last sliding_window tokens only. They share K/V among themselves only, as do the
    others."""

    sliding_rope_theta: float | None = Field(default=None, gt=0)
    """Base of the rotary frequencies of sliding_layers, which rope_scaling then leaves alone. null: those of the other
    layers."""

    embedding_scale: float = Field(default=1.0, gt=0)
    """Factor on the embedding, as Granite has."""

    residual_scale: float = Field(default=1.0, gt=0)
    """Factor on what attention and MLP add to the residual stream, as Granite has."""

    score_scale: float | None = Field(default=None, gt=0)
    """Factor on attention scores, as Granite has. null: 1 / sqrt(head_dim), or what the block says."""

    logit_divisor: float = Field(default=1.0, gt=0)
    """Number by which logits are divided, as in Granite."""

    score_cap: float | None = Field(default=None, gt=0)
    """Attention scores x become cap * tanh(x / cap), as in Gemma 2. Takes memory for all scores at once. null: as they
    are."""

    logit_cap: float | None = Field(default=None, gt=0)
    """Logits x become cap * tanh(x / cap), as in Gemma 2. null: as they are."""

    tie_embeddings: bool = False
    """Whether the head uses the weight of the embedding. If their pipeline stages differ, the head's stage holds a copy
    and their gradients are added up."""

    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an attention weight is dropped while training. 0: no dropout. Refused
    together with data.reset_attention or sliding_window on a GPU, whose kernel for that knows no dropout."""

    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an activation is dropped while training. It applies to the embedding and to what attention
    and MLP add to the residual stream. 0: no dropout."""

    block: Literal["llama", "olmo2", "gemma", "gemma4"] = "llama"
    """Which family's layers these are.

    - llama: norms in front of attention and MLP, as Llama, Qwen, Mistral, SmolLM3, Granite and Phi-3 have.
    - olmo2: OLMo 2's block: norms behind attention and MLP and none in front, q/k-norms over all heads. Needs norm
      rmsnorm, activation swiglu and qk_norm true.
    - gemma: Gemma 2's block, and Gemma 3's with qk_norm: norms in front and behind whose weights are counted from 1,
      and the embedding times sqrt(hidden_size). Needs norm rmsnorm and activation geglu.
    - gemma4: Gemma 4's block in its plain form: norms also behind attention and MLP, normed values, scores that are not
      scaled, and the embedding times sqrt(hidden_size). Needs norm rmsnorm, activation geglu, qk_norm true and no
      rope_scaling. Stock engines load its exports where the last layers share one cache."""

    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights. The projections that write into the residual stream (of attention and
    MLP) get it divided by sqrt(2 * num_layers); norms begin at 1, biases at 0. Not used where weights come from a
    checkpoint."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Which modules of Megatron-core the layers are made of. Their parameters have other names, by which checkpoints
    and exported models are read: a run goes on, and is evaluated, with the kind that it began with.

    - auto: local.
    - local: PyTorch modules, and attention by scaled_dot_product_attention.
    - transformer_engine: Transformer Engine, which needs a GPU. Not tested. Refused where it cannot be imported."""

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

    @property
    def options(self) -> dict[str, Any]:
        """Those of `OPTIONS` by which this model departs from the plain block."""
        given = {key: getattr(self, key) for key in OPTIONS}
        return {key: value for key, value in given.items() if value != type(self).model_fields[key].default}

    @property
    def score_factor(self) -> float | None:
        """What attention scores are multiplied by; None for 1 / sqrt(head width)."""
        return self.block_style.score_scale if self.score_scale is None else self.score_scale

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer. K/V of one kind mean nothing to layers of another."""
        return tuple(
            LayerKind(layer in self.sliding_layers, layer not in self.no_rope_layers)
            for layer in range(self.num_layers)
        )

    @field_validator("biases")
    @classmethod
    def _each_once(cls, biases: list[str]) -> list[str]:
        """In one order, whichever they were given in: two models with the same biases are the same."""
        return [bias for bias in ("qkv", "attention_output", "mlp") if bias in biases]

    @model_validator(mode="after")
    def _block_is_whole(self) -> "ModelConfig":
        for key, needed in self.block_style.needs.items():
            if getattr(self, key) != needed:
                given, cure = getattr(self, key), json.dumps(needed)
                raise ValueError(f"block '{self.block}' does not go with {key} {given!r}: set {key}={cure}")
        for key in self.block_style.lacks:
            if key in self.options:
                raise ValueError(f"block '{self.block}' does not go with {key} {getattr(self, key)!r}: leave it out")
        departs = [f"block '{self.block}'"] if self.block_style.local_only else sorted(self.options)
        if departs and self.transformer_impl == "transformer_engine":
            raise ValueError(
                f"{departs[0]} and transformer_impl 'transformer_engine' do not work together: set "
                "transformer_impl=local"
            )
        return self

    @model_validator(mode="after")
    def _layers_exist(self) -> "ModelConfig":
        for key in ("no_rope_layers", "sliding_layers"):
            layers = getattr(self, key)
            if layers != sorted(set(layers)) or any(layer >= self.num_layers for layer in layers):
                raise ValueError(f"{key} must name layers of 0..{self.num_layers - 1} in ascending order, got {layers}")
        if bool(self.sliding_layers) != (self.sliding_window is not None):
            raise ValueError("sliding_window and sliding_layers belong together: set both, or neither")
        if self.sliding_rope_theta is not None and not self.sliding_layers:
            raise ValueError("sliding_rope_theta is read by sliding_layers only: set them, or leave it out")
        return self

    @model_validator(mode="after")
    def _factors_fit(self) -> "ModelConfig":
        for key in ("short_factors", "long_factors") if self.rope_scaling is not None else ():
            factors: list[float] | None = getattr(self.rope_scaling, key)
            if factors is not None and len(factors) != self.kv_channels // 2:
                raise ValueError(
                    f"rope_scaling.{key} has {len(factors)} entries, but half of head_dim is {self.kv_channels // 2}"
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
