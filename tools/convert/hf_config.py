"""Between a Hugging Face ``config.json`` and the ``model`` section."""

from typing import Any

from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM"}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_NEEDED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
_DEFAULT_HEAD_DIM = {"qwen3": 128}  # what transformers takes where the file says nothing


def model_section(config: dict[str, Any]) -> dict[str, Any]:
    """The ``model`` section for ``config.json``'s content.

    Raises:
        UserError: naming the field that our model cannot represent, or that is missing.
    """

    def refuse(field: str, wanted: str) -> None:
        raise UserError(f"config.json: {field} is {config.get(field)!r}, but only {wanted} can be converted")

    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        refuse("model_type", "llama, qwen3 (dense) and mistral")
    for field in _NEEDED:
        if field not in config:
            raise UserError(f"config.json: {field} is missing")
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "'silu'")
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            refuse(field, "false")
    if config.get("quantization_config"):
        refuse("quantization_config", "weights that are not quantized")
    slides = config.get("sliding_window") is not None and (kind != "qwen3" or config.get("use_sliding_window"))
    if slides and config["sliding_window"] < config["max_position_embeddings"]:
        refuse("sliding_window", "full attention (null)")
    if any(layer != "full_attention" for layer in config.get("layer_types") or []):
        refuse("layer_types", "full_attention in every layer")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(f"config.json: rope_type is {rope_type!r}, but only 'default' and 'llama3' can be converted")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("config.json: partial_rotary_factor must be 1.0 to be converted")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or _DEFAULT_HEAD_DIM.get(str(kind)) or config["hidden_size"] // heads
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "qk_norm": kind == "qwen3",
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "rope_scaling": {key: rope[key] for key in _LLAMA3} if rope_type == "llama3" else None,
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "init_std": config.get("initializer_range", 0.02),
    }


def check_exportable(model: ModelConfig) -> None:
    """Raises UserError where neither the stock architectures nor ours for engines can be this model."""
    for key, wanted in (("norm", "rmsnorm"), ("activation", "geglu" if model.block == "gemma4" else "swiglu")):
        if getattr(model, key) != wanted:
            raise UserError(f"model.{key} is '{getattr(model, key)}', but engines are given '{wanted}' only")


def shared_suffix(sources: tuple[int, ...]) -> int:
    """How many layers at the end read the last one before them: all that Gemma 4's architecture can say of a map.

    Raises:
        UserError: it is another map.
    """
    owners = len(set(sources))
    if sources != (*range(owners), *[owners - 1] * (len(sources) - owners)):
        raise UserError(
            f"kv_source_layers {list(sources)} cannot be said in Gemma 4's architecture, where the last layers share "
            "the K/V of the last one before them: use --cached-layers 0 1 ... N"
        )
    return len(sources) - owners


def gemma4_fields(model: ModelConfig, vocab_size: int, sources: tuple[int, ...]) -> dict[str, Any]:
    """Gemma 4's text model in its plain form: full attention everywhere, per-layer inputs that add nothing, no experts.

    Layers share with the last owner of their own type only, and llama.cpp wants some sliding ones: those before the
    last owner are called sliding, with a window as long as the context.

    Raises:
        UserError: the map is no suffix.
    """
    shared = shared_suffix(sources)
    before = model.num_layers - shared - 1
    # "proportional" over the whole head is the default; llama.cpp's converter knows no other for full attention.
    full = {"rope_type": "proportional", "partial_rotary_factor": 1.0, "rope_theta": model.rope_theta}
    sliding = {"rope_type": "default", "rope_theta": model.rope_theta}
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "global_head_dim": model.kv_channels,
        "layer_types": ["sliding_attention"] * before + ["full_attention"] * (model.num_layers - before),
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        "sliding_window": model.max_position_embeddings,
        "hidden_size_per_layer_input": 1,
        "vocab_size_per_layer_input": vocab_size,
        "use_double_wide_mlp": False,
        "moe_intermediate_size": None,
        "num_kv_shared_layers": shared,
        "final_logit_softcapping": None,
    }


def stock_architecture(model: ModelConfig, asked: str | None) -> str:
    """``llama``, ``qwen3`` or ``mistral``: whose layers these are.

    Raises:
        UserError: ``asked`` is one that they are not.
    """
    possible = ["qwen3"] if model.qk_norm else ["llama", "mistral"]
    if not model.qk_norm and model.rope_scaling is not None:
        possible.remove("mistral")
    if asked is not None and asked not in possible:
        raise UserError(f"--architecture {asked} does not have these layers: this model can be {' or '.join(possible)}")
    return asked or possible[0]


def hf_config(model: ModelConfig, vocab_size: int, dtype: str, special: dict[str, int | None]) -> dict[str, Any]:
    """The fields that all exports share.

    Args:
        special: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope = {"rope_type": "llama3", "rope_theta": model.rope_theta, **model.rope_scaling.model_dump()}
    return {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        **special,
    }


def stock_fields(architecture: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"architectures": [ARCHITECTURES[architecture]], "model_type": architecture}
    if architecture == "mistral":
        fields["sliding_window"] = None
    if architecture == "qwen3":
        fields.update(sliding_window=None, use_sliding_window=False)
    if architecture == "llama":
        fields["mlp_bias"] = False
    return fields


def shared_fields(model: ModelConfig, sources: tuple[int, ...], weight_layers: list[int]) -> dict[str, Any]:
    module = "modeling_skv"
    return {
        "architectures": ["SkvForCausalLM"],
        "model_type": "skv",
        "auto_map": {
            "AutoConfig": f"{module}.SkvConfig",
            "AutoModel": f"{module}.SkvModel",
            "AutoModelForCausalLM": f"{module}.SkvForCausalLM",
        },
        "model_file": "mlx_skv.py",  # mlx-lm's name for the same thing
        "qk_norm": model.qk_norm,
        "kv_source_layers": list(sources),
        "kv_weight_layers": weight_layers,
    }
