"""A nested order of the layers: from all of them, again and again the one is taken out that is missed least."""

import heapq

from skv_dist.evaluation.search.constraints import Constraints
from skv_dist.evaluation.search.measured import Measured


def backward_order(measured: Measured, constraints: Constraints) -> tuple[tuple[int, ...], int]:
    """(order, fewest): all layers, the most needed first; the first k of them for any k >= fewest are an allowed set.

    Greedy on the true loss, and lazy (Minoux 1978): a layer that was missed more than others before is measured again
    only when it comes first, which changes nothing as long as a layer is missed more in a smaller set.
    """
    kept = set(range(measured.num_layers))
    removed: list[int] = []
    queue = [
        (0.0, -1, layer) for layer in kept - constraints.keep
    ]  # rise of the loss, size of the set for which it was
    heapq.heapify(queue)
    # The first round, in which each is measured whatever comes.
    measured.prepare_sets([kept, *(kept - {layer} for *_, layer in queue if constraints.allow(kept - {layer}))])
    while queue:
        _, size, layer = heapq.heappop(queue)
        if not constraints.allow(kept - {layer}):
            continue  # and never will be: sets only shrink
        if size != len(kept):
            rise = measured.loss_of(kept - {layer}) - measured.loss_of(kept)
            heapq.heappush(queue, (rise, len(kept), layer))
            continue
        kept.remove(layer)
        removed.append(layer)
    return (*sorted(kept), *reversed(removed)), len(kept)
