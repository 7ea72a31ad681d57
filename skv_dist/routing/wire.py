"""What crosses each pipeline boundary, from route tables alone."""

from collections.abc import Sequence

from skv_dist.routing.draw import DrawKey
from skv_dist.routing.plan import RoutePlan
from skv_dist.routing.policies import Policy


def live_at_boundaries(plan: RoutePlan, stages: Sequence[range]) -> tuple[tuple[int, ...], ...]:
    """Sources whose K/V cross the boundary behind each stage but the last, in ascending order."""
    return tuple(plan.live_after(stage.stop - 1) for stage in stages[:-1])


def expected_crossings(policy: Policy, stages: Sequence[range], seed: int, draws: int = 256) -> list[tuple[float, int]]:
    """Mean and largest number of sources that cross each boundary, over ``draws`` micro-batches of step 0."""
    found = [
        [len(live) for live in live_at_boundaries(policy.plan(DrawKey(seed, 0, number)), stages)]
        for number in range(draws)
    ]
    return [(sum(counts) / draws, max(counts)) for counts in zip(*found)]
