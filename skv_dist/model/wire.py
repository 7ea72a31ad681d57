"""Hidden state and live K/V as one tensor, for the way from one pipeline stage to the next.

Megatron's schedules carry a single tensor and differentiate a single tensor; its width changes with the route.
"""

from collections.abc import Mapping, Sequence

import torch
from megatron.core.utils import make_viewless_tensor

from skv_dist.config.run import RunConfig
from skv_dist.model.attention import KV
from skv_dist.model.gradients import contiguous_gradient


def kv_width(run: RunConfig) -> int:
    """Columns that the K and V of one layer take in the packed tensor of one tensor-parallel rank.

    With sequence parallelism the hidden state has s/t rows and K/V have s: they are folded to s/t rows of t times the
    width, on the spot and without a collective.
    """
    heads = max(1, run.model.num_kv_heads // run.parallel.tensor)
    fold = run.parallel.tensor if run.parallel.sequence_parallel else 1
    return 2 * heads * run.model.kv_channels * fold


def pack(hidden: torch.Tensor, live: Mapping[int, KV], sources: Sequence[int], width: int | None) -> torch.Tensor:
    """hidden [s/t, b, h] and the K/V of ``sources``, each [s, b, k, d] -> [s/t, b, h + n * kv_width].

    Args:
        live: K/V by layer; must hold every source.
        width: pad with zeros to this many columns; None: no padding.
    """
    parts = [contiguous_gradient(hidden)]
    for source in sources:
        parts += [_fold(tensor, hidden.shape[0]) for tensor in (live[source].key, live[source].value)]
    missing = 0 if width is None else width - sum(part.shape[-1] for part in parts)
    if missing:
        parts.append(hidden.new_zeros(*hidden.shape[:2], missing))
    # The schedule frees what it has sent, which it refuses to do with a view.
    return torch.cat(parts, dim=-1) if len(parts) > 1 else make_viewless_tensor(parts[0], True, True)


def unpack(
    packed: torch.Tensor, hidden_size: int, sources: Sequence[int], heads: int, head_width: int, length: int
) -> tuple[torch.Tensor, dict[int, KV]]:
    """The inverse of `pack`: hidden [s/t, b, h] and, by source, K/V [s, b, k, d].

    Args:
        heads, head_width, length: k, d and s.
    """
    each = heads * head_width * (length // packed.shape[0])
    sizes = [hidden_size] + [each] * (2 * len(sources))
    # One split: its backward writes the gradient of the whole tensor once.
    hidden, *parts = packed.split([*sizes, packed.shape[-1] - sum(sizes)], dim=-1)
    kv = [_unfold(part, length, heads, head_width) for part in parts[:-1]]
    return hidden, {source: KV(kv[2 * i], kv[2 * i + 1]) for i, source in enumerate(sources)}


def _fold(kv: torch.Tensor, rows: int) -> torch.Tensor:
    """[s, b, k, d] -> [rows, b, (s / rows) * k * d]."""
    length, batch = kv.shape[:2]
    return kv.reshape(rows, length // rows, batch, -1).transpose(1, 2).reshape(rows, batch, -1)


def _unfold(part: torch.Tensor, length: int, heads: int, head_width: int) -> torch.Tensor:
    """The inverse of `_fold`."""
    rows, batch = part.shape[:2]
    split = part.reshape(rows, batch, length // rows, heads * head_width).transpose(1, 2)
    return split.reshape(length, batch, heads, head_width)
