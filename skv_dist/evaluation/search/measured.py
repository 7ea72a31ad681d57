"""Losses of sharing maps on the same sequences, each measured once, and their differences with an error."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from skv_dist.routing import map_from_cached_layers
from skv_dist.routing.kinds import Kinds

Table = tuple[int, ...]

_ROUND = 16  # maps measured at once: what an interruption loses


class Difference(NamedTuple):
    """Loss of one map less that of another, in nats per prediction: mean over the sequences, and its standard error."""

    mean: float
    error: float


class Measured:
    """The loss of maps, in nats per prediction that counts.

    Args:
        measure: gives the summed loss of each sequence under each of some maps, float64 [n]; called once for each map.
        counts: predictions that count in each sequence, [n].
        known: what was measured before.
        kinds: of the layers; None where they are of one kind.
    """

    def __init__(
        self,
        num_layers: int,
        measure: Callable[[Sequence[Table]], Sequence[np.ndarray]],
        counts: np.ndarray,
        known: Mapping[Table, np.ndarray] | None = None,
        kinds: Kinds | None = None,
    ) -> None:
        self.num_layers, self.kinds = num_layers, kinds
        self._measure, self._counts = measure, np.asarray(counts, dtype=np.float64)
        self._sums = dict(known or {})

    def is_one_kind(self, layer: int, other: int) -> bool:
        """Whether the two layers may share K/V."""
        return self.kinds is None or self.kinds[layer] == self.kinds[other]

    @property
    def num_measured(self) -> int:
        return len(self._sums)

    def prepare(self, tables: Iterable[Table]) -> None:
        """Measure those of some maps that were not yet. Together they take less time than one by one: what maps agree
        on from layer 0 up is computed once.
        """
        new = sorted(set(tables) - self._sums.keys())  # side by side those that agree on the most layers
        for begin in range(0, len(new), _ROUND):
            part = new[begin : begin + _ROUND]
            for table, sums in zip(part, self._measure(part), strict=True):
                self._sums[table] = np.asarray(sums, dtype=np.float64)

    def prepare_sets(self, sets: Iterable[Iterable[int]]) -> None:
        """`prepare` for the maps in which these layers keep a cache."""
        self.prepare(self.table_of(layers) for layers in sets)

    def sums(self, table: Table) -> np.ndarray:
        """Summed loss of each sequence, float64 [n]."""
        self.prepare([table])
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
        return map_from_cached_layers(self.num_layers, layers, self.kinds)

    def loss_of(self, layers: Iterable[int]) -> float:
        return self.loss(self.table_of(layers))
