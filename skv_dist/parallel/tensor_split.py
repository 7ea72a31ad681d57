"""Between a full parameter and a tensor-parallel rank's part of it.

"Full" is what a single process holds, without vocabulary padding. Fused QKV rows come group by group (the queries of
a group, its key, its value), fused gate and up rows one behind the other, as Megatron lays them out; a rank holds an
equal share of rows of the one, and of each half of the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from skv_dist.errors import UserError

_SUFFIXES = {
    "linear_qkv.weight": "rows",
    "linear_proj.weight": "columns",
    "linear_fc1.weight": "rows",
    "linear_fc2.weight": "columns",
    "embedding.weight": "vocabulary",
    "output_layer.weight": "vocabulary",
}


def kind_of(name: str, gated: bool) -> str:
    """How a parameter is split: ``replicated``, ``rows``, ``columns``, ``halves`` or ``vocabulary``.

    Args:
        name: its name in any layout.
        gated: whether the MLP is gated (fused gate and up).
    """
    for suffix, kind in _SUFFIXES.items():
        if name.endswith(suffix):
            return "halves" if gated and suffix == "linear_fc1.weight" else kind
    return "replicated"


def full_shape(local: Sequence[int], kind: str, size: int, vocab_size: int) -> tuple[int, ...]:
    """Shape of the full parameter from that of one rank's part."""
    shape = list(local)
    if kind in ("rows", "halves"):
        shape[0] *= size
    elif kind == "columns":
        shape[1] *= size
    elif kind == "vocabulary":
        shape[0] = vocab_size
    return tuple(shape)


def take(full: torch.Tensor, kind: str, rank: int, size: int, local: Sequence[int]) -> torch.Tensor:
    """This rank's part, of shape ``local``. Vocabulary rows beyond the full ones are zero."""
    if kind == "rows":
        return full.chunk(size, dim=0)[rank]
    if kind == "columns":
        return full.chunk(size, dim=1)[rank]
    if kind == "halves":
        return torch.cat([half.chunk(size, dim=0)[rank] for half in full.chunk(2, dim=0)])
    if kind == "vocabulary":
        part = full[rank * local[0] : (rank + 1) * local[0]]
        return torch.cat([part, part.new_zeros(local[0] - part.shape[0], *local[1:])])
    return full


def join(parts: Sequence[torch.Tensor], kind: str, vocab_size: int) -> torch.Tensor:
    """The full parameter from all ranks' parts.

    Raises:
        UserError: parts of a replicated parameter differ in shape.
    """
    if kind == "replicated":
        if any(part.shape != parts[0].shape for part in parts):
            raise UserError("a replicated parameter has different shapes on different ranks")
        return parts[0]
    if kind == "rows":
        return torch.cat(list(parts), dim=0)
    if kind == "columns":
        return torch.cat(list(parts), dim=1)
    if kind == "vocabulary":
        return torch.cat(list(parts), dim=0)[:vocab_size]
    halves = [part.chunk(2, dim=0) for part in parts]
    return torch.cat([half[i] for i in (0, 1) for half in halves])


class Piece(NamedTuple):
    """A block of a rank's part, and where it lies in the full parameter.

    Attributes:
        offsets: of its first element in the full parameter.
        block: where it lies in the rank's part.
    """

    offsets: tuple[int, ...]
    block: tuple[slice, ...]


def pieces(kind: str, rank: int, size: int, local: Sequence[int], vocab_size: int) -> list[Piece]:
    """The blocks that a rank's part of shape ``local`` consists of, without vocabulary padding."""
    none = (0,) * len(local)
    everything = tuple(slice(0, n) for n in local)
    if kind == "rows":
        return [Piece((rank * local[0], *none[1:]), everything)]
    if kind == "columns":
        return [Piece((0, rank * local[1], *none[2:]), everything)]
    if kind == "halves":
        half = local[0] // 2
        return [
            Piece(((which * size + rank) * half, *none[1:]), (slice(which * half, (which + 1) * half), *everything[1:]))
            for which in (0, 1)
        ]
    if kind == "vocabulary":
        begin = rank * local[0]
        rows = max(0, min(local[0], vocab_size - begin))
        return [Piece((begin, *none[1:]), (slice(0, rows), *everything[1:]))] if rows else []
    return [Piece(none, everything)]
