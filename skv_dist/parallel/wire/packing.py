"""Hidden state and live K/V as one tensor, for the way from one pipeline stage to the next.

Megatron's schedules carry a single tensor and differentiate a single tensor; its width changes with the route.
"""

from collections.abc import Mapping, Sequence

import torch
from megatron.core.utils import make_viewless_tensor

from skv_dist.config.run import RunConfig
from skv_dist.model.attention import KV


def kv_width(run: RunConfig) -> int:
    """Columns that the K and V of one layer take in the packed tensor of one tensor-parallel rank.

    With sequence parallelism the hidden state has s/t rows and K/V have s: they count as s/t rows of t times the width.
    """
    heads = max(1, run.model.num_kv_heads // run.parallel.tensor)
    fold = run.parallel.tensor if run.parallel.sequence_parallel else 1
    return 2 * heads * run.model.kv_channels * fold


def pack(hidden: torch.Tensor, live: Mapping[int, KV], sources: Sequence[int], width: int | None) -> torch.Tensor:
    """hidden [s/t, b, h] and the K/V of ``sources``, each [s, b, k, d] -> [s/t, b, h + n * kv_width].

    They lie end to end in memory, so that each comes out contiguous: a compiled layer is compiled for one memory layout
    of what it gets, which must not change with the width.

    Args:
        live: K/V by layer; must hold every source.
        width: pad with zeros to this many columns; None: no padding.
    """
    rows, batch = hidden.shape[:2]
    parts = [hidden.flatten()]
    for source in sources:
        parts += [live[source].key.flatten(), live[source].value.flatten()]
    missing = 0 if width is None else width * rows * batch - sum(part.numel() for part in parts)
    if missing:
        parts.append(hidden.new_zeros(missing))
    packed = torch.cat(parts) if len(parts) > 1 else parts[0]
    # The schedule frees what it has sent, which it refuses to do with a view.
    return make_viewless_tensor(packed.view(rows, batch, -1), True, True)


def unpack(
    packed: torch.Tensor, hidden_size: int, sources: Sequence[int], heads: int, head_width: int, length: int
) -> tuple[torch.Tensor, dict[int, KV]]:
    """The inverse of `pack`: hidden [s/t, b, h] and, by source, K/V [s, b, k, d].

    Args:
        heads, head_width, length: k, d and s.
    """
    rows, batch = packed.shape[:2]
    sizes = [rows * batch * hidden_size] + [length * batch * heads * head_width] * (2 * len(sources))
    # One split: its backward writes the gradient of the whole tensor once.
    hidden, *parts = packed.flatten().split([*sizes, packed.numel() - sum(sizes)])
    kv = [part.view(length, batch, heads, head_width) for part in parts[:-1]]
    return hidden.view(rows, batch, hidden_size), {
        source: KV(kv[2 * i], kv[2 * i + 1]) for i, source in enumerate(sources)
    }
