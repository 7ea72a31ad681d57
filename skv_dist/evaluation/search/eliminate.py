"""A nested order of the layers: from all of them, again and again the one is taken out that is missed least."""

from skv_dist.evaluation.search.constraints import Constraints
from skv_dist.evaluation.search.measured import Measured


def backward_order(measured: Measured, constraints: Constraints) -> tuple[tuple[int, ...], int]:
    """(order, fewest): all layers, the most needed first. Its first k are an allowed set for any k >= fewest."""
    kept = set(range(measured.num_layers))
    removed: list[int] = []
    while True:
        without = {measured.table_of(kept - {layer}): layer for layer in kept if constraints.allow(kept - {layer})}
        if not without:
            return (*sorted(kept), *reversed(removed)), len(kept)
        removed.append(without[measured.best(without)])
        kept.remove(removed[-1])
