"""A set made better by swaps, and sharers that choose their owner."""

from skv_dist.evaluation.search.constraints import Constraints
from skv_dist.evaluation.search.measured import Measured, Table


def swapped(measured: Measured, constraints: Constraints, current: Table, tries: int = 8) -> Table:
    """The map with owners exchanged, one for another layer, as long as that lowers the loss by more than its standard
    error.

    Which swaps to try is told by what each layer in the set is worth alone, and each one outside, on the first part of
    the sequences: the best of the ``tries`` most promising ones is taken.
    """
    while True:
        best = measured.best([current, *_offers(measured, constraints, current, tries)])
        if not _is_better(measured, best, current):
            return current
        current = best


def _offers(measured: Measured, constraints: Constraints, current: Table, tries: int) -> list[Table]:
    """The maps behind the most promising swaps."""
    inside = set(current)
    outside = set(range(measured.num_layers)) - inside
    fewer = {layer: measured.table_of(inside - {layer}) for layer in inside - constraints.keep}
    more = {layer: measured.table_of(inside | {layer}) for layer in outside}
    measured.prepare([*fewer.values(), *more.values()], parts=1)
    swaps = sorted(
        (measured.loss(less, parts=1) + measured.loss(with_it, parts=1), out, new)
        for out, less in fewer.items()
        for new, with_it in more.items()
    )
    sets = [(inside - {out}) | {new} for _, out, new in swaps[:tries]]
    return [measured.table_of(each) for each in sets if constraints.allow(each)]


def with_free_sources(measured: Measured, constraints: Constraints, table: Table) -> Table:
    """The map in which a sharer may use any owner before it, not only the nearest. From the last sharer to the first,
    each takes the owner with which the loss is lowest, where that beats its standard error.
    """
    owners = sorted(set(table))
    for layer in reversed(range(len(table))):
        if table[layer] == layer:
            continue
        possible = [owner for owner in owners if owner < layer and measured.is_one_kind(owner, layer)]
        offers = [(*table[:layer], owner, *table[layer + 1 :]) for owner in possible]
        best = measured.best(offer for offer in offers if constraints.allow_map(offer))
        if _is_better(measured, best, table):
            table = best
    return table


def _is_better(measured: Measured, offer: Table, current: Table) -> bool:
    change = measured.difference(offer, current)
    return change.mean < 0 and -change.mean > change.error
