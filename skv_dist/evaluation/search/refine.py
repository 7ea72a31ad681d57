"""A set made better by swaps, and sharers that choose their owner."""

from collections.abc import Iterator

from skv_dist.evaluation.search.constraints import Constraints
from skv_dist.evaluation.search.measured import Measured, Table


def swapped(measured: Measured, constraints: Constraints, layers: tuple[int, ...], tries: int = 8) -> tuple[int, ...]:
    """The set with layers exchanged, one for another, as long as that lowers the loss by more than its standard error.

    Which swaps to try is told by what each layer in the set is worth alone, and each one outside: the ``tries`` most
    promising sums are measured.
    """
    current = tuple(sorted(layers))
    while (better := next(_better(measured, constraints, current, tries), None)) is not None:
        current = better
    return current


def _better(
    measured: Measured, constraints: Constraints, current: tuple[int, ...], tries: int
) -> Iterator[tuple[int, ...]]:
    inside, outside = set(current), set(range(measured.num_layers)) - set(current)
    measured.prepare_sets(
        [inside - {layer} for layer in inside - constraints.keep] + [inside | {layer} for layer in outside]
    )
    missed = {layer: measured.loss_of(inside - {layer}) for layer in inside - constraints.keep}
    gained = {layer: measured.loss_of(inside | {layer}) for layer in outside}
    swaps = sorted((missed[out] + gained[new], out, new) for out in missed for new in gained)
    for _, out, new in swaps[:tries]:
        offer = tuple(sorted((inside - {out}) | {new}))
        if constraints.allow(offer) and _is_better(measured, measured.table_of(offer), measured.table_of(current)):
            yield offer


def with_free_sources(measured: Measured, table: Table) -> Table:
    """The map in which a sharer may use any owner before it, not only the nearest. From the last sharer to the first,
    each takes the owner with which the loss is lowest, where that beats its standard error.
    """
    owners = sorted(set(table))
    for layer in reversed(range(len(table))):
        if table[layer] == layer:
            continue
        possible = [owner for owner in owners if owner < layer and measured.is_one_kind(owner, layer)]
        offers = [(*table[:layer], owner, *table[layer + 1 :]) for owner in possible]
        measured.prepare(offers)
        best = min(offers, key=measured.loss)
        if _is_better(measured, best, table):
            table = best
    return table


def _is_better(measured: Measured, offer: Table, current: Table) -> bool:
    change = measured.difference(offer, current)
    return change.mean < 0 and -change.mean > change.error
