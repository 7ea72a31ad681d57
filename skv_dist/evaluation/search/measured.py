"""Losses of sharing maps on the same sequences, each measured once, and their differences with an error.

The sequences come in parts. A map is measured on as many of them as it takes to tell it from a better one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from skv_dist.routing import map_from_cached_layers
from skv_dist.routing.kinds import Kinds

Table = tuple[int, ...]

_ROUND = 16  # maps measured at once: what an interruption loses
# Standard errors by which a map must be behind another to be given up before all sequences are measured.
# By chance it is so once in 200 times after the first eight sequences, and more seldom after more (Student's t).
_SURE = 3.5


class Difference(NamedTuple):
    """Loss of one map less that of another, in nats per prediction: mean over the sequences, and its standard error."""

    mean: float
    error: float


class Measured:
    """The loss of maps, in nats per prediction that counts.

    Args:
        measure: gives the summed loss of each sequence of a part under each of some maps, float64 [n]; called once for
            each map and part.
        counts: predictions that count in each sequence, [n] for each part.
        known: what was measured before: of each map, the sequences of its first parts.
        kinds: of the layers; None where they are of one kind.
    """

    def __init__(
        self,
        num_layers: int,
        measure: Callable[[Sequence[Table], int], Sequence[np.ndarray]],
        counts: Sequence[np.ndarray],
        known: Mapping[Table, np.ndarray] | None = None,
        kinds: Kinds | None = None,
    ) -> None:
        self.num_layers, self.kinds = num_layers, kinds
        self._measure = measure
        self._counts = np.concatenate(counts).astype(np.float64)
        self._ends = list(accumulate(map(len, counts)))  # sequences of the first parts together
        self._sums = dict(known or {})

    def is_one_kind(self, layer: int, other: int) -> bool:
        """Whether the two layers may share K/V."""
        return self.kinds is None or self.kinds[layer] == self.kinds[other]

    @property
    def num_parts(self) -> int:
        return len(self._ends)

    def num_measured(self, parts: int = 1) -> int:
        """Maps that were measured on so many parts or more."""
        return sum(len(sums) >= self._ends[parts - 1] for sums in self._sums.values())

    def prepare(self, tables: Iterable[Table], parts: int | None = None) -> None:
        """Measure those of some maps that were not yet, on the first ``parts``, or all. Together they take less time
        than one by one: what maps agree on from layer 0 up is computed once.
        """
        wanted = set(tables)
        for part, end in enumerate(self._ends[:parts]):
            # Side by side those that agree on the most layers.
            new = sorted(table for table in wanted if len(self._sums.get(table, ())) < end)
            for begin in range(0, len(new), _ROUND):
                together = new[begin : begin + _ROUND]
                for table, sums in zip(together, self._measure(together, part), strict=True):
                    self._sums[table] = np.concatenate([self._sums.get(table, ()), sums])

    def best(self, tables: Iterable[Table]) -> Table:
        """The map with the least loss, found by a race (Maron & Moore 1994): behind each part those drop out which
        are behind the leader by more than 3.5 standard errors.
        """
        left = sorted(set(tables))
        for parts in range(1, self.num_parts + 1):
            self.prepare(left, parts)
            leader = min(left, key=lambda table: self.loss(table, parts))
            gaps = [self.difference(table, leader, parts) for table in left]
            left = [table for table, gap in zip(left, gaps, strict=True) if gap.mean <= _SURE * gap.error]
            if len(left) == 1:
                break
        return leader

    def sums(self, table: Table, parts: int | None = None) -> np.ndarray:
        """Summed loss of each sequence of the first ``parts``, or of all, float64 [n]."""
        self.prepare([table], parts)
        return self._sums[table][: self._ends[-1 if parts is None else parts - 1]]

    def loss(self, table: Table, parts: int | None = None) -> float:
        sums = self.sums(table, parts)
        return float(sums.sum() / self._counts[: len(sums)].sum())

    def error(self, table: Table) -> float:
        """Standard error of `loss` over sequences."""
        return self._error(self.sums(table))

    def difference(self, table: Table, other: Table, parts: int | None = None) -> Difference:
        """Paired: what both maps find hard in a sequence cancels."""
        gaps = self.sums(table, parts) - self.sums(other, parts)
        return Difference(float(gaps.sum() / self._counts[: len(gaps)].sum()), self._error(gaps))

    def _error(self, sums: np.ndarray) -> float:
        """Standard error of a ratio of sums, of which the sequences are the sample."""
        n, counts = len(sums), self._counts[: len(sums)]
        if n < 2:
            return float("inf")
        residuals = sums - sums.sum() / counts.sum() * counts
        return float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / counts.sum())

    def table_of(self, layers: Iterable[int]) -> Table:
        """The map in which ``layers`` keep a cache, by the deployment rule."""
        return map_from_cached_layers(self.num_layers, layers, self.kinds)

    def loss_of(self, layers: Iterable[int]) -> float:
        return self.loss(self.table_of(layers))
