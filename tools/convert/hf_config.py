"""Between a Hugging Face ``config.json`` and the ``model`` section."""

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from skv_dist.config.blocks import BlockStyle
from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError, cause_in_one_line

from .blocks import BLOCKS, Map
from .families import FAMILIES, Family
from .fields import refuse
from .rope_fields import read_rope, read_rope_by_kind, write_rope

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
    "hidden_activation",
    "tie_word_embeddings",
    "initializer_range",
)
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
    hidden_activation: str | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    num_key_value_heads: int | None = Field(default=None, le=_LARGEST)
    head_dim: int | None = Field(default=None, le=_LARGEST)
    tie_word_embeddings: bool | None = None
    initializer_range: float | None = None
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int | None = Field(default=None, gt=0)
    embedding_multiplier: float | None = None
    residual_multiplier: float | None = None
    attention_multiplier: float | None = None
    logits_scaling: float | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: bool | None = None
    original_max_position_embeddings: int | None = Field(default=None, gt=0, le=_LARGEST)


def model_section(config: dict[str, Any]) -> dict[str, Any]:
    """The ``model`` section for ``config.json``'s content, which `complete` has completed.

    Raises:
        UserError: naming the field that our model cannot represent, or that is missing.
    """
    family = FAMILIES[config["model_type"]]
    _refuse_what_we_lack(config, family)
    heads = config["num_attention_heads"]
    rope = read_rope_by_kind if family.rope_by_kind else read_rope
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
        "tie_embeddings": bool(config.get("tie_word_embeddings")),
        "init_std": config.get("initializer_range", 0.02),
        "block": family.block,
        **rope(config, family.rope_types, config.get(_DEFAULT_THETA, 10000.0)),
    }
    for said in family.says:
        section |= said.read(config)
    if not section.get("sliding_layers"):
        section.pop("sliding_rope_theta", None)  # which no layer would read
    try:
        ModelConfig.model_validate(section)
    except ValidationError as error:
        problem = error.errors()[0]
        place = [_FIELDS.get(str(part), str(part)) for part in problem["loc"]]
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"config.json: {'.'.join(place) + ': ' if place else ''}{message}") from error
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
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, 1)
        nearest = f" (the nearest is {near[0]!r})" if near else ""
        refuse(config, "model_type", f"{', '.join(FAMILIES)}{nearest}")
    family = FAMILIES[model_type]
    for field in _NEEDED:
        if config.get(field) is None:
            raise UserError(f"config.json: {field} is missing")
        if isinstance(config[field], bool) or not isinstance(config[field], int | float):
            refuse(config, field, "a number")
        if config[field] <= 0:
            refuse(config, field, "a number above 0")
        if config[field] > _LARGEST:
            refuse(config, field, f"a number up to {_LARGEST}")
    try:
        _Given.model_validate(config)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"config.json: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    if len(config.get("no_rope_layers") or range(_LARGEST)) < config["num_hidden_layers"]:
        refuse(config, "no_rope_layers", "an entry for each layer")
    by_kind = _ROPE if family.rope_by_kind else ()  # transformers says which of them holds for which kind
    given = {field: config[field] for field in (*_NEEDED, *_DEFAULTED, *family.fields, *by_kind) if field in config}
    try:
        made = CONFIG_MAPPING[model_type](**given)
        defaults = made.to_dict()
    except Exception as error:  # transformers raises a different class for each kind of value that it does not take
        raise UserError(f"config.json: transformers does not take it: {cause_in_one_line(error)}") from error
    whole = {field: defaults[field] for field in (*_DEFAULTED, *family.fields) if field in defaults}
    # Of what a family says the architecture has the last word: it makes layer_types of other fields, for one.
    decided = {field: whole[field] for field in family.fields if field in whole and config.get(field) is None}
    if by_kind:
        return {**whole, **config, **decided, "rope_parameters": made.rope_parameters}
    return {_DEFAULT_THETA: float(made.default_theta), **whole, **config, **decided}


_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
_DEFAULT_THETA = "default_theta"  # of an architecture, where config.json says nothing of rotary positions


def _refuse_what_we_lack(config: dict[str, Any], family: Family) -> None:
    """Raises UserError naming the first field that our model cannot represent."""
    if config.get("architectures") and family.architecture not in config["architectures"]:
        refuse(config, "architectures", family.architecture)
    field, activation = BLOCKS[family.block].activation_field
    if {"swish": "silu"}.get(config[field], config[field]) != activation:
        refuse(config, field, repr(activation))
    for field in ("quantization_config", "compression_config"):
        if config.get(field):
            raise UserError(f"config.json: {field} says that the weights are quantized: only plain ones are converted")


def check_exportable(model: ModelConfig) -> None:
    """Raises UserError where neither the stock architectures nor ours for engines can be this model."""
    for key, wanted in (("norm", "rmsnorm"), ("activation", BLOCKS[model.block].activation)):
        if getattr(model, key) != wanted:
            raise UserError(f"model.{key} is '{getattr(model, key)}', but engines are given '{wanted}' only")


def hf_config(model: ModelConfig, dtype: str, special: dict[str, Any]) -> dict[str, Any]:
    """The fields that all exports have.

    Args:
        special: ``bos_token_id``, ``eos_token_id`` (or a list of them), ``pad_token_id``.
    """
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
        "rope_parameters": write_rope(model),
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        **special,
    }


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
        "hidden_act": BLOCKS[model.block].activation_field[1],
        "qk_norm": model.qk_norm,
        **({"block": block} if (block := block_fields(model)) else {}),
        "kv_source_layers": list(sources),
        "kv_weight_layers": list(weight_layers),
        **({} if order is None else {"kv_order": list(order)}),
    }


def block_fields(model: ModelConfig) -> dict[str, Any]:
    """In what a model departs from the plain block, for code of ours: an engine refuses what it does not know."""
    style, plain = model.block_style, BlockStyle()
    departs = {name: getattr(style, name) for name in ("norms", "norm_offset", "qk_norm_over", "scaled_embedding")}
    return {**{name: value for name, value in departs.items() if value != getattr(plain, name)}, **model.options}


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
