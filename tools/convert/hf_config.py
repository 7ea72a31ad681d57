"""Between a Hugging Face ``config.json`` and the ``model`` section."""

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError, cause_in_one_line

from .blocks import BLOCKS, Map

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM"}
OUR_MODEL_TYPE = "skv"  # of a folder that carries code of ours
_OUR_MODULE, _OUR_MLX_FILE = "modeling_skv", "mlx_skv.py"
CODE = (f"{_OUR_MODULE}.py", _OUR_MLX_FILE)  # the files of ../engines/models that travel with it
# The fields of config.json that have engines run code.
CODE_FIELDS: dict[str, Any] = {
    "auto_map": {
        "AutoConfig": f"{_OUR_MODULE}.SkvConfig",
        "AutoModel": f"{_OUR_MODULE}.SkvModel",
        "AutoModelForCausalLM": f"{_OUR_MODULE}.SkvForCausalLM",
    },
    "model_file": _OUR_MLX_FILE,  # mlx-lm's name for the same thing
}

_LARGEST = 2**31  # of any size; arithmetic with it overflows nothing
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
# Where config.json does not say, transformers' own defaults hold, which differ between the architectures.
_DEFAULTED = (
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "initializer_range",
    "sliding_window",
    "use_sliding_window",
)
_ROPE_FIELDS = {*_LLAMA3, "rope_type", "type", "rope_theta", "partial_rotary_factor"}
_FIELDS = {  # of config.json, by key of the model section
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "rope_scaling": "rope_parameters",
}


class _Given(BaseModel):
    """Types of the fields that are read beside `_NEEDED`; others may be there."""

    model_config = ConfigDict(strict=True, extra="allow")

    architectures: list[str] | None = None
    hidden_act: str | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    num_key_value_heads: int | None = Field(default=None, le=_LARGEST)
    head_dim: int | None = Field(default=None, le=_LARGEST)
    tie_word_embeddings: bool | None = None
    initializer_range: float | None = None
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None


def model_section(config: dict[str, Any]) -> dict[str, Any]:
    """The ``model`` section for ``config.json``'s content, which `complete` has completed.

    Raises:
        UserError: naming the field that our model cannot represent, or that is missing.
    """
    _refuse_what_we_lack(config)
    heads, rope = config["num_attention_heads"], _rope(config)
    section = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "norm_eps": _as_written(config["rms_norm_eps"]),
        "qk_norm": config["model_type"] == "qwen3",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": _llama3(rope, config) if _rope_type(rope) == "llama3" else None,
        "tie_embeddings": bool(config.get("tie_word_embeddings")),
        "init_std": config.get("initializer_range", 0.02),
    }
    try:
        ModelConfig.model_validate(section)
    except ValidationError as error:
        problem = error.errors()[0]
        field = f"{_FIELDS.get(str(problem['loc'][0]), problem['loc'][0])}: " if problem["loc"] else ""
        raise UserError(f"config.json: {field}{problem['msg']}") from error
    return section


def _as_written(value: Any) -> Any:
    """The shortest decimal of a number that went through float32, as 1e-5 in a GGUF file: 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) and float(np.float32(value)) == value else value


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` with what transformers takes for fields that are not there: mistral's sliding window, say.

    Raises:
        UserError: the model is of another type, or a field that has no right default is missing.
    """
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        _refuse(config, "model_type", "llama, qwen3 (dense) and mistral")
    for field in _NEEDED:
        if config.get(field) is None:
            raise UserError(f"config.json: {field} is missing")
        if isinstance(config[field], bool) or not isinstance(config[field], int | float):
            _refuse(config, field, "a number")
        if config[field] <= 0:
            _refuse(config, field, "a number above 0")
        if config[field] > _LARGEST:
            _refuse(config, field, f"a number up to {_LARGEST}")
    try:
        _Given.model_validate(config)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"config.json: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    given = {field: config[field] for field in (*_NEEDED, *_DEFAULTED) if field in config}
    try:
        defaults = CONFIG_MAPPING[model_type](**given).to_dict()
    except Exception as error:  # transformers raises a different class for each kind of value that it does not take
        raise UserError(f"config.json: transformers does not take it: {cause_in_one_line(error)}") from error
    return {**{field: defaults[field] for field in _DEFAULTED if field in defaults}, **config}


def _refuse(config: dict[str, Any], field: str, wanted: str) -> NoReturn:
    raise UserError(f"config.json: {field} is {config.get(field)!r}, but only {wanted} can be converted")


def _refuse_what_we_lack(config: dict[str, Any]) -> None:
    """Raises UserError naming the first field that our model cannot represent."""
    wanted_name = ARCHITECTURES[config["model_type"]]
    if config.get("architectures") and wanted_name not in config["architectures"]:
        _refuse(config, "architectures", wanted_name)
    if config.get("hidden_act") not in ("silu", "swish"):
        _refuse(config, "hidden_act", "'silu'")
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            _refuse(config, field, "false")
    for field in ("quantization_config", "compression_config"):
        if config.get(field):
            raise UserError(f"config.json: {field} says that the weights are quantized: only plain ones are converted")
    slides = config.get("sliding_window") is not None
    if config["model_type"] == "qwen3":
        slides = slides and bool(config.get("use_sliding_window"))
    if slides and config["sliding_window"] < config["max_position_embeddings"]:
        _refuse(config, "sliding_window", "full attention (null)")
    if any(layer != "full_attention" for layer in config.get("layer_types") or []):
        _refuse(config, "layer_types", "full_attention in every layer")
    rope = _rope(config)
    if _rope_type(rope) not in ("default", "llama3"):
        raise UserError(
            f"config.json: rope_type is {_rope_type(rope)!r}, but only 'default' and 'llama3' can be converted"
        )
    theta = rope.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise UserError(f"config.json: rope_theta is {theta!r}, but it must be a number")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise UserError("config.json: partial_rotary_factor must be 1.0 to be converted")
    unknown = sorted(rope.keys() - _ROPE_FIELDS)
    if unknown:  # of other types of positions, or settings for each kind of layer
        raise UserError(f"config.json: {unknown[0]} among the settings of rotary positions cannot be converted")


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, under the old names and the new. Raises UserError where they are no object."""
    merged: dict[str, Any] = {"rope_theta": config.get("rope_theta", 10000.0)}
    for field in ("rope_scaling", "rope_parameters"):
        value = config.get(field) or {}
        if not isinstance(value, dict):
            _refuse(config, field, "an object")
        merged.update(value)
    return merged


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type")) or "default"


def _llama3(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The settings of Llama 3's scaling. Raises UserError where one is missing."""
    # As transformers has it where the original context is not said.
    settings = {"original_max_position_embeddings": config["max_position_embeddings"], **rope}
    for key in _LLAMA3:
        if settings.get(key) is None:
            raise UserError(f"config.json: rope_type is 'llama3', but {key} is missing")
    return {key: settings[key] for key in _LLAMA3}


def check_exportable(model: ModelConfig) -> None:
    """Raises UserError where neither the stock architectures nor ours for engines can be this model."""
    for key, wanted in (("norm", "rmsnorm"), ("activation", BLOCKS[model.block].activation)):
        if getattr(model, key) != wanted:
            raise UserError(f"model.{key} is '{getattr(model, key)}', but engines are given '{wanted}' only")


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


def hf_config(model: ModelConfig, dtype: str, special: dict[str, Any]) -> dict[str, Any]:
    """The fields that all exports have.

    Args:
        special: ``bos_token_id``, ``eos_token_id`` (or a list of them), ``pad_token_id``.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope = {"rope_type": "llama3", "rope_theta": model.rope_theta, **model.rope_scaling.model_dump()}
    activation_field, activation = BLOCKS[model.block].activation_field
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.kv_channels,
        activation_field: activation,
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
    """Of a model that shares nothing."""
    fields: dict[str, Any] = {"architectures": [ARCHITECTURES[architecture]], "model_type": architecture}
    if architecture == "mistral":
        fields["sliding_window"] = None
    if architecture == "qwen3":
        fields.update(sliding_window=None, use_sliding_window=False)
    if architecture == "llama":
        fields["mlp_bias"] = False
    return fields


def shared_fields(
    model: ModelConfig, sources: Map, weight_layers: Sequence[int], order: Sequence[int] | None = None
) -> dict[str, Any]:
    """Of a model that runs code of ours.

    Args:
        weight_layers: those whose key and value weights are in the folder.
        order: of the layers, the most needed first, for ``kv_retention``.
    """
    return {
        "architectures": ["SkvForCausalLM"],
        "model_type": OUR_MODEL_TYPE,
        **CODE_FIELDS,
        "qk_norm": model.qk_norm,
        "kv_source_layers": list(sources),
        "kv_weight_layers": list(weight_layers),
        **({} if order is None else {"kv_order": list(order)}),
    }


def map_of(config: dict[str, Any]) -> Map:
    """The map that ``config.json`` describes, in our way or in Gemma 4's (``num_kv_shared_layers``)."""
    layers = config["num_hidden_layers"]
    owners = layers - (config.get("num_kv_shared_layers") or 0)
    return tuple(config.get("kv_source_layers") or (min(layer, owners - 1) for layer in range(layers)))


def shape_of(config: dict[str, Any]) -> ModelConfig:
    """The shape of an exported model that runs code of ours: what decides on the size of its cache."""
    return ModelConfig.model_validate(
        {
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "ffn_hidden_size": config["intermediate_size"],
            "num_attention_heads": config["num_attention_heads"],
            "num_kv_heads": config["num_key_value_heads"],
            "head_dim": config["head_dim"],
            "vocab_size": config["vocab_size"],
            "qk_norm": config["qk_norm"],
        }
    )
