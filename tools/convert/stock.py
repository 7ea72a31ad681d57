"""As which architecture of transformers a model is exported that shares nothing."""

from typing import Any

from skv_dist.config.blocks import OPTIONS
from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError

from .families import FAMILIES
from .hf_config import hf_config, model_section
from .rope_fields import write_rope_by_kind


def stock_architecture(model: ModelConfig, asked: str | None) -> str:
    """The ``model_type`` of `FAMILIES` that a model which shares nothing is exported as: of those whose config.json
    reads as this model again, the one that is asked for, or the first.

    Raises:
        UserError: ``asked`` is another, or there is none.
    """
    lacking = {name: _not_said(name, model) for name in FAMILIES}
    possible = [name for name, keys in lacking.items() if not keys]
    if not possible:
        of_block = [name for name in lacking if FAMILIES[name].block == model.block]
        nearest = min(of_block, key=lambda name: len(lacking[name]))
        key = lacking[nearest][0]
        # An adaptive folder has layers of one kind (`to_hf`).
        option = "--adaptive" if len(set(model.layer_kinds)) == 1 else "a map in which layers share (--retention)"
        raise UserError(
            f"no architecture of transformers that is known here has these layers: the nearest, {nearest}, cannot say "
            f"model.{key} {getattr(model, key)!r}; with {option} the model is exported with code of ours"
        )
    if asked is not None and asked not in possible:
        key = lacking[asked][0]
        raise UserError(
            f"--architecture {asked} does not have these layers, as it cannot say model.{key} {getattr(model, key)!r}: "
            f"this model can be {' or '.join(possible)}"
        )
    return asked or possible[0]


def _not_said(model_type: str, model: ModelConfig) -> list[str]:
    """The keys in which the config.json of a family would be read as another model."""
    if FAMILIES[model_type].block != model.block:
        return ["block"]
    try:
        section = model_section({**hf_config(model, "float32", {}), **stock_fields(model_type, model)})
    except UserError:
        return ["rope_scaling"]  # all else can be written, if only as something else
    read = ModelConfig.model_validate(section)
    return [key for key in _SAID if getattr(read, key) != getattr(model, key)]


# What config.json must say of a model. Its sizes are said by all architectures alike.
_SAID = ("block", "activation", "qk_norm", "rope_theta", "rope_scaling", *OPTIONS)


def stock_fields(model_type: str, model: ModelConfig) -> dict[str, Any]:
    """Of a model that shares nothing and is said to be of a family."""
    family = FAMILIES[model_type]
    fields: dict[str, Any] = {"architectures": [family.architecture], "model_type": model_type}
    if family.rope_by_kind:
        fields["rope_parameters"] = write_rope_by_kind(model)
    for said in family.says:
        fields |= said.write(model)
    return fields
