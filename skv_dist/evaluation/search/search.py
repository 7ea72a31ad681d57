"""The whole search: a set of layers for each budget, and one nested order for all."""

from collections.abc import Sequence
from dataclasses import dataclass

from skv_dist.errors import UserError
from skv_dist.evaluation.search.constraints import Constraints
from skv_dist.evaluation.search.eliminate import backward_order
from skv_dist.evaluation.search.groups import cheapest_cuts, group_costs
from skv_dist.evaluation.search.measured import Measured, Table
from skv_dist.evaluation.search.refine import swapped, with_free_sources
from skv_dist.routing import num_kept

_WORST_GROUP = 1.0  # nats: a group that costs more is in no good set


@dataclass(frozen=True)
class Found:
    """The set for one budget.

    Attributes:
        budget: part of the cache that may be kept.
        layers: those that keep it, ascending.
        table: ``kv_source_layers``.
    """

    budget: float
    layers: tuple[int, ...]
    table: Table


@dataclass(frozen=True)
class Result:
    """Attributes:
    found: one for each budget, in the given order.
    order: all layers, the most needed first: for any k from ``fewest`` on its first k are a good set.
    """

    found: list[Found]
    order: tuple[int, ...]
    fewest: int


def sizes(budgets: Sequence[float], constraints: Constraints) -> dict[float, int]:
    """How many layers each budget keeps.

    Raises:
        UserError: a budget is not in (0, 1], is less than a layer, or is less than the constraints need.
    """
    layers = constraints.num_layers
    for budget in budgets:
        if not 0 < budget <= 1:
            raise UserError(f"--budgets must lie in (0, 1], got {budget:g}")
        if budget * layers < 0.5:
            raise UserError(
                f"--budgets {budget:g} keeps less than one of {layers} layers: ask for {1 / layers:.3g} or more"
            )
        if num_kept(layers, budget) < constraints.smallest:
            raise UserError(
                f"--budgets {budget:g} keeps {num_kept(layers, budget)} of {layers} layers, but --keep, --apart and "
                f"--stages need {constraints.smallest}: raise it, or ask for less"
            )
    return {budget: num_kept(layers, budget) for budget in budgets}


def search(
    measured: Measured, budgets: Sequence[float], constraints: Constraints, *, free_sources: bool = False
) -> Result:
    """Search for the layers whose cache is worth most.

    Raises:
        UserError: see `sizes`.
    """
    wanted = sizes(budgets, constraints)
    order, fewest = backward_order(measured, constraints)
    cuts = cheapest_cuts(group_costs(measured, constraints, _WORST_GROUP), measured.num_layers)
    found = []
    for budget, size in wanted.items():
        starts = {measured.table_of(order[:size])} if size >= fewest else set()
        if size in cuts and constraints.allow(cuts[size]):
            starts.add(measured.table_of(cuts[size]))
        if not starts:
            raise UserError(f"no set of {size} layers was found that --keep, --apart and --stages allow")
        table = measured.best(swapped(measured, constraints, start) for start in starts)
        if free_sources:
            table = with_free_sources(measured, constraints, table)
        found.append(Found(budget, tuple(sorted(set(table))), table))
    return Result(found, order, fewest)
