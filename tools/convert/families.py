"""The table of model families: transformers' architectures, and how each says what our ``model`` section says.

A family that has nothing new is an entry here. One with another block is also an entry in ``skv_dist/config/blocks.py``
and in `blocks`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .fields import (
    Said,
    always,
    biases,
    layers_without_rope,
    number,
    only,
    original_context,
    score_scale,
    window_by_layer,
    window_everywhere,
)
from .rope_fields import ALL_TYPES


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        architecture: the class.
        says: what its models may differ in, or have in common, beyond sizes and rotary positions. Keys that no entry
            gives have their defaults.
        block: ``model.block`` of its models.
        rope_types: that it has, by the names that it gives them.
        rope_by_kind: whether it has rotary settings for each kind of layer.
        joined: its weights that hold several of those that others have, one above the other.
    """

    architecture: str
    says: tuple[Said, ...]
    block: str = "llama"
    rope_types: Mapping[str, str] = field(default_factory=lambda: ALL_TYPES)
    rope_by_kind: bool = False
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(name for said in self.says for name in said.fields)


_ATTENTION_BIAS = {"qkv": "attention_bias", "attention_output": "attention_bias"}
_OF_GEMMA = (
    biases(**_ATTENTION_BIAS),
    score_scale("query_pre_attn_scalar", -0.5),
    number("final_logit_softcapping", "logit_cap"),
    only("use_bidirectional_attention", False),
)
_NO_BIAS = only("attention_bias", False), only("mlp_bias", False)

FAMILIES: dict[str, Family] = {  # by ``model_type``; a model is exported as the first that can say it
    "llama": Family("LlamaForCausalLM", (biases(**_ATTENTION_BIAS, mlp="mlp_bias"),)),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        (always(qk_norm=True), biases(**_ATTENTION_BIAS), only("mlp_bias", False), window_by_layer()),
    ),
    "mistral": Family("MistralForCausalLM", (*_NO_BIAS, window_everywhere())),
    "qwen2": Family("Qwen2ForCausalLM", (biases(qkv=True), only("mlp_bias", False), window_by_layer())),
    "smollm3": Family(
        "SmolLM3ForCausalLM", (biases(**_ATTENTION_BIAS, mlp="mlp_bias"), layers_without_rope(), window_by_layer())
    ),
    "granite": Family(
        "GraniteForCausalLM",
        (
            biases(**_ATTENTION_BIAS, mlp="mlp_bias"),
            number("embedding_multiplier", "embedding_scale"),
            number("residual_multiplier", "residual_scale"),
            score_scale("attention_multiplier"),
            number("logits_scaling", "logit_divisor"),
        ),
    ),
    "olmo2": Family("Olmo2ForCausalLM", (always(qk_norm=True), biases(**_ATTENTION_BIAS)), block="olmo2"),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        (always(qk_norm=True), biases(**_ATTENTION_BIAS), window_by_layer(asked_by=None)),
        block="olmo2",
        rope_by_kind=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        (
            always(activation="geglu"),
            *_OF_GEMMA,
            number("attn_logit_softcapping", "score_cap"),
            window_by_layer(asked_by=None),
        ),
        block="gemma",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        (
            always(activation="geglu", qk_norm=True),
            *_OF_GEMMA,
            only("attn_logit_softcapping", None),
            window_by_layer(asked_by=None),
        ),
        block="gemma",
        rope_by_kind=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        (*_NO_BIAS, window_everywhere(), original_context()),
        rope_types={"default": "default", "longrope": "longrope", "su": "longrope"},
        joined={
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        },
    ),
}
