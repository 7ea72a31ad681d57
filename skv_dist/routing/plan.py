"""What follows from a route table alone: who reads which layer's K/V, and until when it must be kept.

This is the compiler's view of a forward pass (liveness analysis): every rank computes it on the host from the same
table, with no communication.
"""

from collections.abc import Sequence
from functools import cached_property

from skv_dist.errors import UserError


class RoutePlan:
    """A validated route table with its liveness.

    Args:
        table: ``table[l]`` is the layer whose own K/V layer ``l`` attends to; ``table[l] <= l``, 0-based.

    Raises:
        UserError: a source lies outside [0, l].
    """

    def __init__(self, table: Sequence[int]) -> None:
        for layer, source in enumerate(table):
            if not 0 <= source <= layer:
                raise UserError(f"route table: layer {layer} has source {source}, which is not one of 0..{layer}")
        self.table = tuple(table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoutePlan) and self.table == other.table

    def __hash__(self) -> int:
        return hash(self.table)

    def __repr__(self) -> str:
        return f"RoutePlan({list(self.table)})"

    @property
    def num_layers(self) -> int:
        return len(self.table)

    def source(self, layer: int) -> int:
        """The layer whose K/V ``layer`` reads; itself for a layer that does not borrow."""
        return self.table[layer]

    @cached_property
    def readers(self) -> tuple[int, ...]:
        """Number of layers that read each layer's own K/V, the layer itself included."""
        counts = [0] * len(self.table)
        for source in self.table:
            counts[source] += 1
        return tuple(counts)

    @cached_property
    def last_reader(self) -> tuple[int, ...]:
        """The last layer that reads each layer's own K/V; -1 where nobody does."""
        last = [-1] * len(self.table)
        for layer, source in enumerate(self.table):
            last[source] = layer
        return tuple(last)

    @cached_property
    def trailing(self) -> range:
        """The layers at the end that lend nothing: all borrow from layers before them, and nobody reads their K/V."""
        return range(max(self.table) + 1, self.num_layers)

    def live_after(self, layer: int) -> tuple[int, ...]:
        """Sources at or before ``layer`` that a later layer still reads, in ascending order.

        This is what must be kept once ``layer`` has run, and what crosses a pipeline boundary behind it.
        """
        return tuple(s for s in range(min(layer + 1, self.num_layers)) if self.last_reader[s] > layer)

    def live_at_boundaries(self, stages: Sequence[range]) -> tuple[tuple[int, ...], ...]:
        """Sources whose K/V cross the boundary behind each stage but the last, in ascending order.

        Args:
            stages: the layers of each pipeline stage, in the order of execution.
        """
        return tuple(self.live_after(stage.stop - 1) for stage in stages[:-1])

    @property
    def retention(self) -> float:
        """Fraction of layers whose K/V at least one layer reads."""
        return len(set(self.table)) / len(self.table)
