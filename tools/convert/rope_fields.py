"""Rotary positions in a Hugging Face ``config.json``: ``rope_parameters``, or ``rope_scaling`` and ``rope_theta``."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from skv_dist.config.model import ModelConfig
from skv_dist.config.rope import RopeScaling
from skv_dist.errors import UserError

from .fields import Config, refuse

ALL_TYPES = {name: name for name in ("default", "linear", "dynamic", "llama3", "yarn", "longrope")}
_CONTEXT = "original_max_position_embeddings"
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_READ: dict[str, set[str]] = {
    "default": {"factor", "low_freq_factor", "high_freq_factor", _CONTEXT},  # nothing is stretched, whatever they are
    "linear": {"factor"},
    "dynamic": {"factor", _CONTEXT},  # which transformers 5.23 does not read for it
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _CONTEXT},
    "yarn": {
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", _CONTEXT)
    },
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", _CONTEXT},
}


def read_rope(config: Config, types: Mapping[str, str], default_theta: float) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` of the ``model`` section.

    Args:
        types: what a family calls its ``rope_type``, and what that is here.
        default_theta: where none is said.

    Raises:
        UserError: naming what cannot be represented, or is missing.
    """
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta", default_theta)}
    for field in ("rope_scaling", "rope_parameters"):
        value = config.get(field) or {}
        if not isinstance(value, dict):
            refuse(config, field, "an object")
        rope.update(value)
    asked = rope.get("rope_type", rope.get("type")) or "default"
    if not isinstance(asked, str) or asked not in types:
        wanted = ", ".join(map(repr, types))
        raise UserError(f"config.json: rope_type is {asked!r}, but only {wanted} can be converted")
    kind, theta = types[asked], rope.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise UserError(f"config.json: rope_theta is {theta!r}, but it must be a number")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise UserError("config.json: partial_rotary_factor must be 1.0 to be converted")
    unknown = sorted(rope.keys() - _COMMON - _READ[kind])
    if unknown:  # of other types of positions, or settings for each kind of layer
        raise UserError(f"config.json: {unknown[0]} among the settings of rotary positions cannot be converted")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    # As transformers has it where the original context is said beside the settings (Phi-3), or not at all.
    context = config.get(_CONTEXT) or rope.get(_CONTEXT) or config["max_position_embeddings"]
    settings = {**rope, _CONTEXT: context}
    return {"rope_theta": theta, "rope_scaling": {"type": kind, **_SETTINGS[kind](settings, config)}}


def read_rope_by_kind(config: Config, types: Mapping[str, str], default_theta: float) -> dict[str, Any]:
    """As `read_rope`, and ``sliding_rope_theta``, where ``rope_parameters`` has settings for each kind of layer.

    Raises:
        UserError: also where layers with a window have a scaling of their own.
    """
    settings = config.get("rope_parameters") or {}
    if not isinstance(settings, dict) or not all(isinstance(settings.get(kind), dict) for kind in KINDS):
        refuse(config, "rope_parameters", f"an object with {' and '.join(KINDS)}")
    full, sliding = (
        read_rope({**config, "rope_scaling": None, "rope_parameters": settings[kind]}, types, default_theta)
        for kind in KINDS
    )
    if full["rope_scaling"] is not None and not full["rope_scaling"].get("truncate", True):
        raise UserError("config.json: truncate is False, which transformers does not read here: leave it out")
    if sliding == full:
        return {**full, "sliding_rope_theta": None}
    if sliding["rope_scaling"] is not None:
        raise UserError(
            f"config.json: rope_type of {KINDS[1]} is {sliding['rope_scaling']['type']!r}, but only 'default', or all "
            f"that {KINDS[0]} has, can be converted"
        )
    return {**full, "sliding_rope_theta": sliding["rope_theta"]}


KINDS = ("full_attention", "sliding_attention")


def _needed(settings: Config, kind: str, *names: str) -> dict[str, Any]:
    for name in names:
        if settings.get(name) is None:
            raise UserError(f"config.json: rope_type is '{kind}', but {name} is missing")
    return {name: settings[name] for name in names}


def _llama3(settings: Config, config: Config) -> dict[str, Any]:
    return _needed(settings, "llama3", "factor", "low_freq_factor", "high_freq_factor", _CONTEXT)


def _longest(settings: Config, config: Config) -> float:
    """How much longer texts may become: ``factor``, or what the two contexts make it."""
    context = _numbers(settings, _CONTEXT, "factor")[_CONTEXT]
    return float(settings.get("factor") or config["max_position_embeddings"] / context)


def _yarn(settings: Config, config: Config) -> dict[str, Any]:
    factor, given = _longest(settings, config), _numbers(settings, "mscale", "mscale_all_dim", "attention_factor")

    def grown(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    larger = given["attention_factor"]
    if larger is None and given["mscale"] and given["mscale_all_dim"]:
        larger = grown(given["mscale"]) / grown(given["mscale_all_dim"])
    return {
        "factor": factor,
        "attention_factor": larger,
        "beta_fast": settings.get("beta_fast") or 32.0,
        "beta_slow": settings.get("beta_slow") or 1.0,
        "truncate": settings.get("truncate", True),
        _CONTEXT: settings[_CONTEXT],
    }


def _longrope(settings: Config, config: Config) -> dict[str, Any]:
    factor, context = _longest(settings, config), settings[_CONTEXT]
    larger = _numbers(settings, "attention_factor")["attention_factor"]
    if larger is None:
        larger = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    divisors = _needed(settings, "longrope", "short_factor", "long_factor")
    return {
        "short_factors": divisors["short_factor"],
        "long_factors": divisors["long_factor"],
        "attention_factor": larger,
        _CONTEXT: context,
    }


def _numbers(settings: Config, *names: str) -> dict[str, Any]:
    """Settings that are numbers above 0, or None. Raises UserError where one is something else."""
    for name in names:
        value = settings.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise UserError(f"config.json: {name} is {value!r}, but it must be a number above 0")
    return {name: settings.get(name) for name in names}


_SETTINGS: dict[str, Callable[[Config, Config], dict[str, Any]]] = {
    "linear": lambda settings, config: _needed(settings, "linear", "factor"),
    "dynamic": lambda settings, config: _needed(settings, "dynamic", "factor"),
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}

_THEIRS = {"short_factors": "short_factor", "long_factors": "long_factor"}
_WRITTEN = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _CONTEXT),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "truncate", _CONTEXT),
    "longrope": ("short_factors", "long_factors", "attention_factor", _CONTEXT),
}


def write_rope(model: ModelConfig) -> Config:
    """``rope_parameters``."""
    scaling: RopeScaling | None = model.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    given = {key: getattr(scaling, key) for key in _WRITTEN[scaling.type]}
    said = {_THEIRS.get(key, key): value for key, value in given.items() if value is not None}
    return {"rope_type": scaling.type, "rope_theta": model.rope_theta, **said}


def write_rope_by_kind(model: ModelConfig) -> Config:
    """``rope_parameters`` with settings for each kind of layer."""
    full = write_rope(model)
    if model.sliding_rope_theta is None:
        return dict.fromkeys(KINDS, full)
    return dict(zip(KINDS, (full, {"rope_type": "default", "rope_theta": model.sliding_rope_theta})))
