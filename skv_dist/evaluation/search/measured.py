"""Losses of sharing maps on the same sequences, each measured once, and their differences with an error."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from skv_dist.routing import map_from_cached_layers

Table = tuple[int, ...]


class Difference(NamedTuple):
    """Loss of one map less that of another, in nats per prediction: mean over the sequences, and its standard error."""

    mean: float
    error: float


class Measured:
    """The loss of maps, in nats per prediction that counts.

    Args:
        measure: gives the summed loss of each sequence under a map, float64 [n]; called once for each map.
        counts: predictions that count in each sequence, [n].
        known: what was measured before.
    """

    def __init__(
        self,
        num_layers: int,
        measure: Callable[[Table], np.ndarray],
        counts: np.ndarray,
        known: Mapping[Table, np.ndarray] | None = None,
    ) -> None:
        self.num_layers = num_layers
        self._measure, self._counts = measure, np.asarray(counts, dtype=np.float64)
        self._sums = dict(known or {})

    @property
    def num_measured(self) -> int:
        return len(self._sums)

    def sums(self, table: Table) -> np.ndarray:
        """Summed loss of each sequence, float64 [n]."""
        if table not in self._sums:
            self._sums[table] = np.asarray(self._measure(table), dtype=np.float64)
        return self._sums[table]

    def loss(self, table: Table) -> float:
        return float(self.sums(table).sum() / self._counts.sum())

    def error(self, table: Table) -> float:
        """Standard error of `loss` over sequences."""
        return self._error(self.sums(table))

    def difference(self, table: Table, other: Table) -> Difference:
        """Paired: what both maps find hard in a sequence cancels."""
        gaps = self.sums(table) - self.sums(other)
        return Difference(float(gaps.sum() / self._counts.sum()), self._error(gaps))

    def _error(self, sums: np.ndarray) -> float:
        """Standard error of a ratio of sums, of which the sequences are the sample."""
        n, total = len(sums), self._counts.sum()
        if n < 2:
            return float("inf")
        residuals = sums - sums.sum() / total * self._counts
        return float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / total)

    def table_of(self, layers: Iterable[int]) -> Table:
        """The map in which ``layers`` keep a cache, by the deployment rule."""
        return map_from_cached_layers(self.num_layers, layers)

    def loss_of(self, layers: Iterable[int]) -> float:
        return self.loss(self.table_of(layers))
