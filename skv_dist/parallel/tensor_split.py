"""How parameters are cut over tensor-parallel ranks: between a full tensor and a rank's part of it.

"Full" is what a single process holds, without vocabulary padding. Fused QKV rows come group by group (the queries of
a group, its key, its value), fused gate and up rows one behind the other, as Megatron lays them out; a rank holds an
equal share of rows of the one, and of each half of the other.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError

Shape = Sequence[int]


class Block(NamedTuple):
    """A block of a rank's part, and where it lies in the full parameter.

    Attributes:
        offsets: of its first element in the full parameter.
        slices: where it lies in the rank's part.
    """

    offsets: tuple[int, ...]
    slices: tuple[slice, ...]


@dataclass(frozen=True)
class Split(ABC):
    """How one parameter is cut. Parts are given by their shape, which every rank has alike.

    Attributes:
        num_ranks: tensor-parallel size.
    """

    num_ranks: int

    @abstractmethod
    def full_shape(self, part: Shape) -> tuple[int, ...]:
        """Shape of the full parameter."""

    @abstractmethod
    def take(self, full: torch.Tensor, rank: int, part: Shape) -> torch.Tensor:
        """The part of ``rank``, of shape ``part``."""

    @abstractmethod
    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full parameter from all ranks' parts, the inverse of `take`."""

    @abstractmethod
    def blocks(self, rank: int, part: Shape) -> list[Block]:
        """What the part of ``rank`` consists of, without vocabulary padding."""


class Replicated(Split):
    """Every rank holds the whole parameter."""

    def full_shape(self, part: Shape) -> tuple[int, ...]:
        return tuple(part)

    def take(self, full: torch.Tensor, rank: int, part: Shape) -> torch.Tensor:
        return full

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Raises UserError where the parts differ in shape."""
        if any(part.shape != parts[0].shape for part in parts):
            raise UserError("a replicated parameter has different shapes on different ranks")
        return parts[0]

    def blocks(self, rank: int, part: Shape) -> list[Block]:
        return [Block(_origin(part), _all_of(part))]


class Rows(Split):
    """Rank r holds the r-th share of the rows: [n * rows, ...] -> n x [rows, ...]."""

    def full_shape(self, part: Shape) -> tuple[int, ...]:
        return (part[0] * self.num_ranks, *part[1:])

    def take(self, full: torch.Tensor, rank: int, part: Shape) -> torch.Tensor:
        return full.chunk(self.num_ranks, dim=0)[rank]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(parts), dim=0)

    def blocks(self, rank: int, part: Shape) -> list[Block]:
        return [Block((rank * part[0], *_origin(part)[1:]), _all_of(part))]


class Columns(Split):
    """Rank r holds the r-th share of the columns: [rows, n * columns] -> n x [rows, columns]."""

    def full_shape(self, part: Shape) -> tuple[int, ...]:
        return (part[0], part[1] * self.num_ranks, *part[2:])

    def take(self, full: torch.Tensor, rank: int, part: Shape) -> torch.Tensor:
        return full.chunk(self.num_ranks, dim=1)[rank]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(parts), dim=1)

    def blocks(self, rank: int, part: Shape) -> list[Block]:
        return [Block((0, rank * part[1], *_origin(part)[2:]), _all_of(part))]


class Halves(Rows):
    """Two matrices behind one another (gate and up), each split by rows: a rank holds its share of either."""

    def take(self, full: torch.Tensor, rank: int, part: Shape) -> torch.Tensor:
        return torch.cat([half.chunk(self.num_ranks, dim=0)[rank] for half in full.chunk(2, dim=0)])

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        gates, ups = zip(*(part.chunk(2, dim=0) for part in parts))
        return torch.cat([*gates, *ups])

    def blocks(self, rank: int, part: Shape) -> list[Block]:
        rows = part[0] // 2
        return [
            Block(
                ((half * self.num_ranks + rank) * rows, *_origin(part)[1:]),
                (slice(half * rows, (half + 1) * rows), *_all_of(part)[1:]),
            )
            for half in (0, 1)
        ]


@dataclass(frozen=True)
class Vocabulary(Split):
    """Rows, one a token: the parts are padded, the full parameter is not.

    Attributes:
        vocab_size: rows of the full parameter.
    """

    vocab_size: int

    def full_shape(self, part: Shape) -> tuple[int, ...]:
        return (self.vocab_size, *part[1:])

    def take(self, full: torch.Tensor, rank: int, part: Shape) -> torch.Tensor:
        rows = full[rank * part[0] : (rank + 1) * part[0]]
        return torch.cat([rows, rows.new_zeros(part[0] - rows.shape[0], *part[1:])])

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(parts), dim=0)[: self.vocab_size]

    def blocks(self, rank: int, part: Shape) -> list[Block]:
        first = rank * part[0]
        rows = max(0, min(part[0], self.vocab_size - first))
        return [Block((first, *_origin(part)[1:]), (slice(0, rows), *_all_of(part)[1:]))] if rows else []


def _origin(part: Shape) -> tuple[int, ...]:
    return (0,) * len(part)


def _all_of(part: Shape) -> tuple[slice, ...]:
    return tuple(slice(0, length) for length in part)


_BY_SUFFIX: dict[str, type[Split]] = {
    "linear_qkv.weight": Rows,
    "linear_qkv.bias": Rows,
    "linear_proj.weight": Columns,
    "linear_fc1.weight": Rows,
    "linear_fc1.bias": Rows,
    "linear_fc2.weight": Columns,
    # Adapters (`skv_dist.model.adapter`): each is split as the rows, or the columns, of its weight are.
    **{f"lora_B.{part}": Rows for part in ("q", "k", "v", "gate", "up")},
    **{f"lora_A.{part}": Columns for part in ("o", "down")},
    "embedding.weight": Vocabulary,
    "output_layer.weight": Vocabulary,
}


def split_of(name: str, run: RunConfig) -> Split:
    """How the parameter called ``name`` (in any layout) is cut in this run."""
    num_ranks = run.parallel.tensor
    if run.model.block_style.qk_norm_over == "all_heads" and name.endswith(
        ("q_layernorm.weight", "k_layernorm.weight")
    ):
        return Rows(num_ranks)
    for suffix, split in _BY_SUFFIX.items():
        if not name.endswith(suffix):
            continue
        if split is Vocabulary:
            return Vocabulary(num_ranks, run.vocab_size)
        if suffix.startswith("linear_fc1.") and run.model.gated:
            return Halves(num_ranks)
        return split(num_ranks)
    return Replicated(num_ranks)
