"""Rotary position frequencies, plain and stretched to a longer context (``model.rope_scaling``)."""

import math
from typing import NamedTuple

import torch

from skv_dist.config.model import LayerKind, ModelConfig
from skv_dist.config.rope import RopeScaling


class Frequencies(NamedTuple):
    """How positions of one kind of layer rotate.

    Attributes:
        inverse: float32 [d/2], radians per position.
        factor: on cosines and sines.
    """

    inverse: torch.Tensor
    factor: float = 1.0


def frequencies(config: ModelConfig, kind: LayerKind, length: int) -> Frequencies | None:
    """Those of the layers of a kind, in a text of ``length`` tokens; None where positions do not rotate.

    Rotary positions: Su et al., arXiv 2104.09864. Each stretching is as transformers defines it for the rope_type of
    the same name, in its order of operations: other roundings of a frequency would be seen by `skv-convert verify`.
    """
    if not kind.has_rope:
        return None
    if kind.is_sliding and config.sliding_rope_theta is not None:
        return Frequencies(1.0 / _wavelengths(config.sliding_rope_theta, config.kv_channels))
    if config.rope_scaling is None:
        return Frequencies(1.0 / _wavelengths(config.rope_theta, config.kv_channels))
    return _STRETCHED[config.rope_scaling.type](config, config.rope_scaling, length)


def _wavelengths(theta: float, width: int) -> torch.Tensor:
    """float32 [d/2]: positions per radian."""
    exponents = torch.arange(0, width, 2, dtype=torch.int64).to(torch.float32) / width
    return theta**exponents


def _linear(config: ModelConfig, scaling: RopeScaling, length: int) -> Frequencies:
    return Frequencies(1.0 / _wavelengths(config.rope_theta, config.kv_channels) / _factor(scaling))


def _dynamic(config: ModelConfig, scaling: RopeScaling, length: int) -> Frequencies:
    """NTK-aware: a larger base, by the length of the text in relation to the context."""
    width, context, factor = config.kv_channels, config.max_position_embeddings, _factor(scaling)
    growth = factor * max(length, context) / context - (factor - 1)
    return Frequencies(1.0 / _wavelengths(config.rope_theta * growth ** (width / (width - 2)), width))


def _llama3(config: ModelConfig, scaling: RopeScaling, length: int) -> Frequencies:
    """Wavelengths beyond the original context are stretched by ``factor``, short ones kept, those between joined."""
    plain = 1.0 / _wavelengths(config.rope_theta, config.kv_channels)
    wavelength = 2 * math.pi / plain
    context = scaling.original_max_position_embeddings
    # 0 at wavelengths that must be stretched, 1 at those that are kept
    smooth = (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return Frequencies((1 - smooth) * plain / _factor(scaling) + smooth * plain)


def _yarn(config: ModelConfig, scaling: RopeScaling, length: int) -> Frequencies:
    """Peng et al., arXiv 2309.00071: between two numbers of turns over the original context, by dimension."""
    width, factor = config.kv_channels, _factor(scaling)

    def dimension(turns: float) -> float:
        context = scaling.original_max_position_embeddings
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    span = last - first if last != first else 0.001
    kept = 1 - ((torch.arange(width // 2, dtype=torch.float32) - first) / span).clamp(0, 1)
    wavelengths = _wavelengths(config.rope_theta, width)
    inverse = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    by_default = 0.1 * math.log(factor) + 1.0  # 1 where the factor is 1
    return Frequencies(inverse, scaling.attention_factor or by_default)


def _longrope(config: ModelConfig, scaling: RopeScaling, length: int) -> Frequencies:
    """Ding et al., arXiv 2402.13753: a divisor for each frequency, others where the text is long."""
    is_long = length > scaling.original_max_position_embeddings
    divisors = scaling.long_factors if is_long else scaling.short_factors
    assert divisors is not None
    assert scaling.attention_factor is not None
    stretched = torch.tensor(divisors, dtype=torch.float32) * _wavelengths(config.rope_theta, config.kv_channels)
    return Frequencies(1.0 / stretched, scaling.attention_factor)


def _factor(scaling: RopeScaling) -> float:
    assert scaling.factor is not None  # checked with the configuration
    return scaling.factor


_STRETCHED = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def changes_with_length(config: ModelConfig) -> bool:
    """Whether the frequencies of a text are other than those of its beginning."""
    return config.rope_scaling is not None and config.rope_scaling.type in ("dynamic", "longrope")


def rotary_table(of: Frequencies, length: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """[2, s, 1, 1, d]: cosines and sines for `rotate`, computed in float32 and rounded to ``dtype`` once."""
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, of.inverse.to(device)).repeat(1, 2)[:, None, None, :]  # [s, d/2] -> [s, 1, 1, d]
    return (torch.stack([angles.cos(), angles.sin()]) * of.factor).to(dtype)


class RotaryTables:
    """Cosines and sines by kind of layer, computed in float32 when they are first asked for.

    Args:
        dtype: of the tables.
        made_on: where they are computed; None: where they are used. Devices round cosines differently.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, made_on: str | None = None) -> None:
        self._config, self._dtype, self._made_on = config, dtype, made_on
        self._tables: dict[LayerKind, tuple[int, torch.Tensor]] = {}  # with the length they were made for

    def of(self, kind: LayerKind, length: int, device: torch.device) -> torch.Tensor | None:
        """See `rotary_table`, for the first ``length`` positions; None where layers of this kind do not rotate."""
        made_for, table = self._tables.get(kind, (0, None))
        fits = made_for == length if changes_with_length(self._config) else made_for >= length
        if table is None or not fits or table.device != device:
            found = frequencies(self._config, kind, length)
            if found is None:
                return None
            table = rotary_table(found, length, self._dtype, self._made_on or device).to(device)
            self._tables[kind] = (length, table)
        return table[:, :length]


def rotate(x: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    """Rotary positions of ``x`` [s, b, heads, d], over halves (not interleaved): the arithmetic of Megatron's
    ``apply_rotary_pos_emb``, which would take cosines and sines anew in every layer. ``table``: None to leave it.
    """
    if table is None:
        return x
    cosine, sine = table.unbind()
    first, second = x.chunk(2, dim=-1)  # [s, b, heads, d/2] each
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
