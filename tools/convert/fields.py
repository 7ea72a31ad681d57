"""How differences between models are said in a Hugging Face ``config.json``, each in both directions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError

Config = dict[str, Any]  # the content of config.json
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Said:
    """One difference.

    Attributes:
        read: keys of the ``model`` section from a config that has all ``fields``. Raises UserError where no key can
            hold what it says.
        write: fields of config.json that a reader needs.
        fields: those that ``read`` looks at, and those from which transformers makes their defaults.
    """

    read: Callable[[Config], dict[str, Any]]
    write: Callable[[ModelConfig], Config] = lambda model: {}
    fields: tuple[str, ...] = ()


def refuse(config: Config, field: str, wanted: str) -> NoReturn:
    """Raises UserError: what config.json says of a field is not ``wanted``."""
    raise UserError(f"config.json: {field} is {config.get(field)!r}, but only {wanted} can be converted")


def always(**keys: Any) -> Said:
    """Keys that have the same value in every model of the family."""
    return Said(lambda config: dict(keys))


def number(field: str, key: str) -> Said:
    """A number under another name."""
    return Said(lambda config: {key: config[field]}, lambda model: {field: getattr(model, key)}, (field,))


def only(field: str, value: Any) -> Said:
    """A field that must have this value, or be absent."""

    def read(config: Config) -> dict[str, Any]:
        if config.get(field) not in (None, value):
            refuse(config, field, repr(value))
        return {}

    return Said(read, lambda model: {field: value}, (field,))


def biases(**by_projection: str | bool) -> Said:
    """Which projections have a bias.

    Args:
        by_projection: for a value of ``model.biases`` the field that says so, or True where it is always there. Values
            that are not named are never there.
    """
    fields = sorted({field for field in by_projection.values() if isinstance(field, str)})

    def has(config: Mapping[str, Any], field: str | bool) -> bool:
        return field if isinstance(field, bool) else bool(config.get(field))

    def read(config: Config) -> dict[str, Any]:
        return {"biases": [bias for bias, field in by_projection.items() if has(config, field)]}

    def write(model: ModelConfig) -> Config:
        return {
            field: any(bias in model.biases for bias, other in by_projection.items() if other == field)
            for field in fields
        }

    return Said(read, write, tuple(fields))


def score_scale(field: str, exponent: float = 1.0) -> Said:
    """A factor on attention scores that is always said.

    Args:
        exponent: the factor is the field to this power; where it is another than 1, the field is a whole number.
    """

    def read(config: Config) -> dict[str, Any]:
        if config[field] is None or config[field] <= 0:
            refuse(config, field, "a number above 0")
        plain = (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) ** -0.5
        scale = config[field] if exponent == 1 else config[field] ** exponent
        return {"score_scale": None if scale == plain else scale}

    def write(model: ModelConfig) -> Config:
        scale = model.score_factor or model.kv_channels**-0.5
        return {field: scale if exponent == 1 else round(scale ** (1 / exponent))}

    return Said(read, write, (field,))


def _window(config: Config) -> int | None:
    """``sliding_window``; None where no text is longer."""
    window: int | None = config.get("sliding_window")
    return None if window is None or window >= config["max_position_embeddings"] else window


def window_everywhere() -> Said:
    """A window in all layers or none: Mistral, Phi-3."""

    def read(config: Config) -> dict[str, Any]:
        if any(kind != _FULL for kind in config.get("layer_types") or []):
            refuse(config, "layer_types", "full_attention in every layer")  # transformers does not read it here
        window = _window(config)
        return {
            "sliding_window": window,
            "sliding_layers": [] if window is None else list(range(config["num_hidden_layers"])),
        }

    def write(model: ModelConfig) -> Config:
        every = model.sliding_layers == list(range(model.num_layers))
        return {"sliding_window": model.sliding_window if every else None}

    return Said(read, write, ("sliding_window",))


def window_by_layer(asked_by: str | None = "use_sliding_window") -> Said:
    """A window in the layers of ``layer_types``.

    Args:
        asked_by: a field that says whether there is one at all; None where there always is, whatever its size: such
            layers may differ in more than that.
    """

    def read(config: Config) -> dict[str, Any]:
        kinds = config.get("layer_types") or []
        if any(kind not in (_SLIDING, _FULL) for kind in kinds):
            refuse(config, "layer_types", f"{_FULL} and {_SLIDING}")
        window = config.get("sliding_window") if asked_by is None else _window(config) if config.get(asked_by) else None
        layers = [layer for layer, kind in enumerate(kinds) if kind == _SLIDING]
        is_asked = asked_by is None or bool(config.get(asked_by))
        if layers and (config.get("sliding_window") is None or not is_asked):
            refuse(config, "layer_types", f"{_FULL} where sliding_window and use_sliding_window ask for no window")
        return {"sliding_window": window if layers else None, "sliding_layers": layers if window is not None else []}

    def write(model: ModelConfig) -> Config:
        slides = model.sliding_window is not None
        kinds = [_SLIDING if kind.is_sliding else _FULL for kind in model.layer_kinds]
        if asked_by is None:  # transformers wants a window even where no layer has it
            return {"sliding_window": model.sliding_window or model.max_position_embeddings, "layer_types": kinds}
        said = {"sliding_window": model.sliding_window, asked_by: slides}
        return {**said, "layer_types": kinds} if slides else said

    fields = ("sliding_window", "max_window_layers", "layer_types")
    return Said(read, write, (*fields, asked_by) if asked_by else fields)


def layers_without_rope() -> Said:
    """SmolLM3's ``no_rope_layers``, in which 1 is a layer with rotary positions."""

    def read(config: Config) -> dict[str, Any]:
        rotates = config["no_rope_layers"][: config["num_hidden_layers"]]
        return {"no_rope_layers": [layer for layer, rotary in enumerate(rotates) if not rotary]}

    def write(model: ModelConfig) -> Config:
        return {"no_rope_layers": [int(kind.has_rope) for kind in model.layer_kinds]}

    return Said(read, write, ("no_rope_layers", "no_rope_layer_interval"))


def original_context() -> Said:
    """Phi-3's field beside the rotary settings, which wins over the one among them (`rope_fields.read_rope`)."""
    name = "original_max_position_embeddings"

    def write(model: ModelConfig) -> Config:
        scaling = model.rope_scaling
        return {name: model.max_position_embeddings if scaling is None else scaling.original_max_position_embeddings}

    return Said(lambda config: {}, write, (name,))
