"""``model.rope_scaling``: how rotary positions are stretched to a longer context."""

from typing import Literal

from pydantic import Field, model_validator

from skv_dist.config.section import Section

_NEEDED = {
    "llama3": ("factor",),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factors", "long_factors", "attention_factor"),
}
# What each type reads beside `original_max_position_embeddings`. Another key that is set would be ignored.
_READ = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("short_factors", "long_factors", "attention_factor"),
}


class RopeScaling(Section):
    """Stretches rotary positions to a longer context, as transformers does for the rope_type of the same name."""

    type: Literal["llama3", "linear", "dynamic", "yarn", "longrope"] = "llama3"
    """The rule.

    - llama3: long wavelengths are stretched, short ones stay, those between are joined smoothly.
    - linear: all wavelengths are stretched by factor.
    - dynamic: none up to model.max_position_embeddings; beyond it the base grows with the length (NTK).
    - yarn: as llama3 with limits in turns over the original context, and larger scores (arXiv 2309.00071).
    - longrope: a factor of its own for each wavelength (arXiv 2402.13753)."""

    factor: float | None = Field(default=None, ge=1, examples=[8.0])
    """How much longer wavelengths become. Needed by every type but longrope."""

    low_freq_factor: float = Field(default=1.0, gt=0)
    """Read by type llama3. Wavelengths above original_max_position_embeddings / low_freq_factor are stretched by the
    whole factor."""

    high_freq_factor: float = Field(default=4.0, gt=0)
    """Read by type llama3. Wavelengths below original_max_position_embeddings / high_freq_factor stay as they are.
    Those between the two limits are joined smoothly. Must be greater than low_freq_factor."""

    original_max_position_embeddings: int = Field(default=8192, gt=0)
    """Context in tokens that the model was first trained with. Read by types llama3, yarn and longrope."""

    beta_fast: float = Field(default=32.0, gt=0)
    """Read by type yarn. Wavelengths that turn more often over the original context stay as they are."""

    beta_slow: float = Field(default=1.0, gt=0)
    """Read by type yarn. Wavelengths that turn less often over the original context are stretched by the whole
    factor."""

    truncate: bool = True
    """Read by type yarn. Whether the two limits are rounded outwards to whole dimensions."""

    attention_factor: float | None = Field(default=None, gt=0)
    """Factor on cosines and sines, by which scores grow twice. Read by types yarn and longrope. null: for yarn
    0.1 ln(factor) + 1; longrope needs a number."""

    short_factors: list[float] | None = None
    """Divisor of each frequency (head_dim / 2 of them) in texts up to the original context. Needed by longrope."""

    long_factors: list[float] | None = None
    """Divisor of each frequency in longer texts. Needed by longrope."""

    @model_validator(mode="after")
    def _complete(self) -> "RopeScaling":
        for key in _NEEDED[self.type]:
            if getattr(self, key) is None:
                raise ValueError(f"type '{self.type}' needs {key}: set it")
        read = ("type", "original_max_position_embeddings", *_READ[self.type])
        for key, field in type(self).model_fields.items():
            if key not in read and getattr(self, key) != field.default:
                raise ValueError(f"{key} is not read by type '{self.type}': leave it out")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be greater than low_freq_factor")
        if self.beta_fast <= self.beta_slow:
            raise ValueError("beta_fast must be greater than beta_slow")
        for key in ("short_factors", "long_factors"):
            if any(factor <= 0 for factor in getattr(self, key) or ()):
                raise ValueError(f"{key} must be greater than 0")
        return self
