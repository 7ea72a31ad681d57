"""What layers of each kind know of positions: how far they rotate, and which of them may be seen."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from skv_dist.config.model import LayerKind, ModelConfig
from skv_dist.model.documents import attention_mask
from skv_dist.model.kv_cache import KvCache
from skv_dist.model.rotary import RotaryTables


class Place(NamedTuple):
    """For the layers of one kind.

    Attributes:
        rotary: see `skv_dist.model.rotary.rotary_table`; None where positions do not rotate.
        mask: see `skv_dist.model.attention.SdpaCoreAttention`.
    """

    rotary: torch.Tensor | None
    mask: Any

    def last(self) -> "Place":
        """Of the last position alone; while decoding."""
        return Place(None if self.rotary is None else self.rotary[:, -1:], self.mask[:, :, -1:])


Places = dict[LayerKind, Place]


def places_of(
    model: ModelConfig,
    kinds: Iterable[LayerKind],
    tables: RotaryTables,
    tokens: torch.Tensor,
    documents: torch.Tensor | None = None,
    cache: KvCache | None = None,
) -> Places:
    """One `Place` for each of ``kinds``.

    Args:
        tokens, documents, cache: see `skv_dist.model.chunk.RoutedChunk.forward`.
    """
    length, begin = tokens.shape[1], 0 if cache is None else cache.length
    found: Places = {}
    for kind in dict.fromkeys(kinds):
        rotary = tables.of(kind, begin + length, tokens.device)
        window = model.sliding_window if kind.is_sliding else None
        mask = attention_mask(length, documents, window, tokens.device) if cache is None else cache.mask(length, window)
        found[kind] = Place(None if rotary is None else rotary[:, begin:], mask)
    return found
