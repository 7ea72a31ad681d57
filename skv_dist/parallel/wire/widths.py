"""Widths of the tensors on the wire, from the route plans of a step. Every rank computes the same, on its own."""

from collections.abc import Sequence
from dataclasses import dataclass

from skv_dist.config.run import RunConfig
from skv_dist.parallel.wire.packing import Packing
from skv_dist.routing import RoutePlan


@dataclass(frozen=True)
class WireWidths:
    """Columns of the packed tensors of one step.

    Attributes:
        exact: per micro-batch and boundary (behind each stage but the last), what hidden state and live K/V need.
        padded: the one width that the interleaved schedule sends; None for 1F1B, which sends the exact ones.
        beside: columns that travel in front of them.
        num_chunks: model chunks per rank.
    """

    exact: tuple[tuple[int, ...], ...]
    padded: int | None
    beside: int
    num_chunks: int

    def behind(self, rank: int) -> list[int]:
        """Widths of the tensors that go from pipeline rank ``rank`` to the next, in the order of the schedule."""
        if self.padded is not None:
            return [self.beside + self.padded] * (len(self.exact) * self.num_chunks)
        num_boundaries = len(self.exact[0])
        return [self.beside + widths[rank] for widths in self.exact] if 0 <= rank < num_boundaries else []


def wire_widths(run: RunConfig, plans: Sequence[RoutePlan], beside: int = 0) -> WireWidths:
    """Widths for one step's micro-batches, with ``beside`` columns of something else in front."""
    packing, stages = Packing.of(run), run.stages
    exact = tuple(tuple(packing.width(len(live)) for live in plan.live_at_boundaries(stages)) for plan in plans)
    interleaved = run.parallel.virtual_pipeline > 1
    padded = max(max(widths) for widths in exact) if interleaved else None
    return WireWidths(exact, padded, beside, run.parallel.virtual_pipeline)
