"""A first set for every budget at once: the cost of each group of layers, and the best way to cut the model into some.

The cost of a group is measured alone, with the full cache everywhere else, and on the first part of the sequences: a
first set need not be the best one. That costs of groups add up is an assumption. `skv_dist.evaluation.search.refine`
makes good for both.
"""

from collections.abc import Mapping

from skv_dist.evaluation.search.constraints import Constraints
from skv_dist.evaluation.search.measured import Measured

Group = tuple[int, int]  # first layer, and the layer behind the last


def group_costs(measured: Measured, constraints: Constraints, worst: float) -> dict[Group, float]:
    """The rise of the loss when a group of layers uses the K/V of its first one.

    Longer groups are left out where a shorter one with the same beginning costs ``worst`` nats already, or holds a
    layer that must keep its own.
    """
    layers = measured.num_layers
    full = tuple(range(layers))
    costs: dict[Group, float] = {(first, first + 1): 0.0 for first in range(layers)}
    growing = list(range(layers))  # first layers of the groups that may be made longer
    for length in range(2, constraints.apart + 1):
        growing = [first for first in growing if _may_end_at(first + length, constraints)]
        if not growing:
            break
        tables = {first: measured.table_of({*full} - {*full[first + 1 : first + length]}) for first in growing}
        measured.prepare([full, *tables.values()], parts=1)
        for first, table in tables.items():
            costs[first, first + length] = measured.difference(table, full, parts=1).mean
        growing = [first for first in growing if costs[first, first + length] <= worst]
    return costs


def _may_end_at(end: int, constraints: Constraints) -> bool:
    """Whether a group may take in the layer before ``end``."""
    return end <= constraints.num_layers and end - 1 not in constraints.keep


def cheapest_cuts(costs: Mapping[Group, float], num_layers: int) -> dict[int, tuple[int, ...]]:
    """For each number of groups the first layers of those with the least sum of costs, by dynamic programming.

    Numbers of groups that the given costs do not reach are left out.
    """
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}  # by groups and layers behind us
    for end in range(1, num_layers + 1):
        for first in range(end):
            if (first, end) not in costs:
                continue
            for groups in range(first + 1):
                if (groups, first) in best:
                    so_far, firsts = best[groups, first]
                    offer = (so_far + costs[first, end], (*firsts, first))
                    best[groups + 1, end] = min(best.get((groups + 1, end), offer), offer)
    return {groups: firsts for (groups, end), (_, firsts) in best.items() if end == num_layers}
