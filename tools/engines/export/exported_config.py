"""``config.json`` of an exported folder, checked before anything is computed from it."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# Far above any model that is served, and small enough that arithmetic with them fills no memory.
_Size = Annotated[int, Field(gt=0, le=2**24)]
_Layers = Annotated[int, Field(gt=0, le=2**12)]
_Layer = Annotated[int, Field(ge=0)]
_Token = Annotated[int, Field(ge=0, le=2**31)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Fields(BaseModel):
    """Others may be there: engines and their users add to them."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Map(_Fields):
    """What decides on the map of a folder, ours or Gemma 4's."""

    num_hidden_layers: _Layers
    num_kv_shared_layers: _Layer | None = None
    kv_source_layers: list[_Layer] | None = None
    kv_weight_layers: list[_Layer] | None = None
    dtype: Literal["float32", "bfloat16", "float16"]

    @model_validator(mode="after")
    def _is_map(self) -> "_Map":
        layers = self.num_hidden_layers
        if (self.num_kv_shared_layers or 0) >= layers:
            raise ValueError(f"num_kv_shared_layers is {self.num_kv_shared_layers}, but there are {layers} layers")
        sources = self.kv_source_layers
        if sources is None:
            return self
        if len(sources) != layers:
            raise ValueError(f"kv_source_layers has {len(sources)} entries for {layers} layers")
        for layer, source in enumerate(sources):
            if source > layer or sources[source] != source:
                raise ValueError(f"kv_source_layers[{layer}] is {source}, which is no earlier owner of a cache")
        return self


class _Rope(_Fields):
    rope_type: Literal["default", "llama3", "linear", "dynamic", "yarn", "longrope"]
    rope_theta: _Positive
    factor: _Positive | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    original_max_position_embeddings: _Size | None = None

    @model_validator(mode="after")
    def _complete(self) -> "_Rope":
        if self.rope_type != "llama3":  # other types are for transformers to check
            return self
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            if getattr(self, name) is None:
                raise ValueError(f"rope_type is 'llama3', but {name} is missing")
        if self.low_freq_factor == self.high_freq_factor:
            raise ValueError("low_freq_factor and high_freq_factor are equal")
        return self


class _Block(_Fields):
    """In what the layers depart from Llama's: see ``modeling_skv``, which knows the values that are left out."""

    model_config = ConfigDict(strict=True, extra="forbid")

    norms: Literal["behind", "both"] | None = None
    norm_offset: float | None = None
    scaled_embedding: Literal[True] | None = None
    qk_norm_over: Literal["all_heads"] | None = None
    biases: list[Literal["qkv", "attention_output", "mlp"]] | None = None
    no_rope_layers: list[_Layer] | None = None
    sliding_window: _Size | None = None
    sliding_layers: list[_Layer] | None = None
    sliding_rope_theta: _Positive | None = None
    embedding_scale: _Positive | None = None
    residual_scale: _Positive | None = None
    score_scale: _Positive | None = None
    logit_divisor: _Positive | None = None
    score_cap: _Positive | None = None
    logit_cap: _Positive | None = None


class _Ours(_Map):
    """What `modeling_skv` reads."""

    model_type: Literal["skv"]
    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size
    head_dim: _Size
    max_position_embeddings: _Size
    rms_norm_eps: _Positive
    qk_norm: bool
    block: _Block | None = None
    tie_word_embeddings: bool
    rope_parameters: _Rope
    kv_source_layers: list[_Layer]
    kv_weight_layers: list[_Layer]
    kv_order: list[_Layer] | None = None
    kv_retention: float | None = None
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    bos_token_id: _Token | None = None
    eos_token_id: _Token | list[_Token] | None = None
    pad_token_id: _Token | None = None

    @model_validator(mode="after")
    def _fits(self) -> "_Ours":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but positions rotate pairs")
        order = self.kv_order
        if order is not None and (sorted(order) != list(range(self.num_hidden_layers)) or order[0] != 0):
            raise ValueError(f"kv_order must name each of 0..{self.num_hidden_layers - 1} once, and 0 first")
        return self


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of an exported folder, as it stands there.

    Raises:
        ValueError: it cannot be read, or a field is not what an export writes; naming file and field.
    """
    file = folder / "config.json"
    config = read_object(file)
    kind = _Ours if config.get("model_type") == "skv" else _Map
    try:
        kind.model_validate(config)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise ValueError(
            f"{file}: {place + ': ' if place else ''}{problem['msg'].removeprefix('Value error, ')}"
        ) from error
    return config


class _Sampling(_Fields):
    """``generation_config.json``, as far as other formats take it over."""

    eos_token_id: _Token | list[_Token] | None = None


def read_sampling(folder: Path) -> dict[str, Any]:
    """``generation_config.json`` of an exported folder; empty where there is none.

    Raises:
        ValueError: it cannot be read, or its ends are no tokens.
    """
    file = folder / "generation_config.json"
    if not file.exists():
        return {}
    sampling = read_object(file)
    try:
        _Sampling.model_validate(sampling)
    except ValidationError as error:
        raise ValueError(f"{file}: eos_token_id: {error.errors()[0]['msg']}") from error
    return sampling


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError where it cannot be read, or is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that the map of a folder of ours needs, with their shapes [out, in].

    Args:
        config: as `read_config` returns it.
    """
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer, source in enumerate(config["kv_source_layers"]):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes |= {
            f"model.layers.{layer}.input_layernorm.weight": (hidden,),
            f"model.layers.{layer}.post_attention_layernorm.weight": (hidden,),
            f"{attention}.q_proj.weight": (queries, hidden),
            f"{attention}.o_proj.weight": (hidden, queries),
            f"{mlp}.gate_proj.weight": (inner, hidden),
            f"{mlp}.up_proj.weight": (inner, hidden),
            f"{mlp}.down_proj.weight": (hidden, inner),
        }
        if source == layer:
            shapes |= {f"{attention}.k_proj.weight": (keys, hidden), f"{attention}.v_proj.weight": (keys, hidden)}
        if config["qk_norm"]:
            shapes[f"{attention}.q_norm.weight"] = (width,)
        if config["qk_norm"] and source == layer:
            shapes[f"{attention}.k_norm.weight"] = (width,)
    return shapes
