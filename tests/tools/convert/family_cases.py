"""Every option that a family of models has, on a small model: what tests of families go through."""

from typing import Any, NamedTuple

from tests.tools.convert.hf_models import LLAMA3, make

_LAYERS = 4
_THETA = {"rope_theta": 10000.0}
_YARN = {"rope_type": "yarn", **_THETA, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0}
_LONGROPE = {
    "rope_type": "longrope",
    **_THETA,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": 32,
}
_PLAIN = {"rope_type": "default", **_THETA}
_BY_KIND = {"full_attention": _YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
_CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
_MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_BIASES = {"attention_bias": True, "mlp_bias": True}


class Case(NamedTuple):
    """Attributes:
    kind: ``model_type``.
    options: fields of its config.
    """

    kind: str
    options: dict[str, Any]

    def model(self) -> Any:
        return make(self.kind, layers=_LAYERS, **self.options)


CASES = {
    "llama-biases": Case("llama", _BIASES),
    "llama-linear": Case("llama", {"rope_parameters": {"rope_type": "linear", **_THETA, "factor": 3.0}}),
    "llama-dynamic": Case(
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", **_THETA, "factor": 3.0}, "max_position_embeddings": 64},
    ),
    "llama-llama3": Case("llama", {"rope_parameters": LLAMA3, "attention_bias": True}),
    "llama-yarn": Case("llama", {"rope_parameters": _YARN}),
    "llama-yarn-mscale": Case("llama", {"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.3}}),
    "llama-yarn-exact": Case(
        "llama", {"rope_parameters": {**_YARN, "truncate": False, "attention_factor": 1.3, "beta_slow": 0.5}}
    ),
    "llama-longrope-long": Case("llama", {"rope_parameters": _LONGROPE}),
    "llama-longrope-short": Case(
        "llama", {"rope_parameters": {**_LONGROPE, "original_max_position_embeddings": 64, "factor": 4.0}}
    ),
    "qwen2": Case("qwen2", {"tied": True}),
    "qwen2-windows": Case("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3-windows": Case(
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "mistral-windows": Case("mistral", {"sliding_window": 8}),
    "smollm3": Case("smollm3", {"no_rope_layer_interval": 2, "tied": True}),
    "smollm3-all": Case(
        "smollm3", {"no_rope_layers": [1, 0, 0, 1], **_BIASES, "use_sliding_window": True, "sliding_window": 8}
    ),
    "granite": Case(
        "granite",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
            "logits_scaling": 7.0,
            "tied": True,
        },
    ),
    "granite-biases": Case("granite", {**_BIASES, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "olmo2": Case("olmo2", {}),
    "olmo2-biases": Case("olmo2", {"attention_bias": True, "rope_parameters": _YARN}),
    "olmo3": Case("olmo3", {"rope_parameters": _BY_KIND, "sliding_window": 8}),
    "olmo3-all": Case(
        "olmo3",
        {
            "rope_parameters": {"full_attention": _PLAIN, "sliding_attention": _PLAIN},
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "attention_bias": True,
        },
    ),
    "gemma2": Case("gemma2", {**_CAPS, "query_pre_attn_scalar": 12, "sliding_window": 8, "tied": True}),
    "gemma2-all": Case("gemma2", {**_CAPS, "attention_bias": True, "layer_types": _MIXED, "sliding_window": 8}),
    "gemma3": Case("gemma3_text", {"rope_parameters": _BY_KIND, "layer_types": _MIXED, "sliding_window": 8}),
    "phi3": Case("phi3", {}),
    "phi3-windows": Case("phi3", {"sliding_window": 8}),
    "phi3-longrope": Case("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32}),
}
