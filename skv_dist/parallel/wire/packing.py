"""Hidden state and live K/V as one tensor, for the way from one pipeline stage to the next.

Megatron's schedules carry a single tensor and differentiate a single tensor; its width changes with the route.

Axes: s sequence, b batch, h hidden, k KV heads on this rank, d head width, t tensor-parallel size where sequence
parallelism splits the hidden state by position, else 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.utils import make_viewless_tensor

from skv_dist.config.run import RunConfig
from skv_dist.model.attention import KV


@dataclass(frozen=True)
class Packing:
    """The numbers that decide how a run packs: h, k, d and t."""

    hidden_size: int
    num_kv_heads: int
    head_width: int
    sequence_split: int

    @classmethod
    def of(cls, run: RunConfig) -> "Packing":
        heads = max(1, run.model.num_kv_heads // run.parallel.tensor)
        return cls(run.model.hidden_size, heads, run.model.kv_channels, run.parallel.sequence_split)

    @property
    def kv_width(self) -> int:
        """Columns that the K and V of one layer take in the packed tensor of one tensor-parallel rank.

        With sequence parallelism the hidden state has s/t rows and K/V have s: they count as s/t rows of t times the
        width.
        """
        return 2 * self.num_kv_heads * self.head_width * self.sequence_split

    def width(self, num_sources: int) -> int:
        """Columns of hidden state and the K/V of ``num_sources`` layers."""
        return self.hidden_size + num_sources * self.kv_width

    def pack(
        self, hidden: torch.Tensor, live: Mapping[int, KV], sources: Sequence[int], width: int | None = None
    ) -> torch.Tensor:
        """hidden [s/t, b, h] and the K/V of ``sources``, each [s, b, k, d] -> [s/t, b, width].

        They lie end to end in memory, so that each comes out contiguous: a compiled layer is compiled for one memory
        layout of what it gets, which must not change with the width.

        Args:
            live: K/V by layer; must hold every source.
            width: pad with zeros to this many columns; None: no padding.
        """
        rows, batch = hidden.shape[:2]
        parts = [hidden.flatten()]
        for source in sources:
            parts += [live[source].key.flatten(), live[source].value.flatten()]
        padding = 0 if width is None else width * rows * batch - sum(part.numel() for part in parts)
        if padding:
            parts.append(hidden.new_zeros(padding))
        packed = torch.cat(parts) if len(parts) > 1 else parts[0]
        # The schedule frees what it has sent, which it refuses to do with a view.
        return make_viewless_tensor(packed.view(rows, batch, -1), True, True)

    def unpack(self, packed: torch.Tensor, sources: Sequence[int]) -> tuple[torch.Tensor, dict[int, KV]]:
        """The inverse of `pack`: hidden [s/t, b, h] and, by source, K/V [s, b, k, d]."""
        rows, batch = packed.shape[:2]
        length = rows * self.sequence_split
        kv_shape = (length, batch, self.num_kv_heads, self.head_width)
        kv_size = length * batch * self.num_kv_heads * self.head_width
        sizes = [rows * batch * self.hidden_size] + [kv_size] * (2 * len(sources))
        # One split: its backward writes the gradient of the whole tensor once.
        hidden, *parts = packed.flatten().split([*sizes, packed.numel() - sum(sizes)])
        keys_and_values = [part.view(kv_shape) for part in parts[:-1]]  # the last part is padding
        live = {
            source: KV(key, value) for source, key, value in zip(sources, keys_and_values[::2], keys_and_values[1::2])
        }
        return hidden.view(rows, batch, self.hidden_size), live
