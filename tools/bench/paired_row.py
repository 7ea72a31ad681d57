"""One row of the tables of time to first token. Imports no other package, as `prefill_mlx` runs without torch."""

import statistics
from collections.abc import Callable, Mapping

SHARES = (0.25, 0.5, 0.75)
"""Of the layers: how many trail in the maps that are timed."""


def paired_row(
    context: int, trailing: int, num_layers: int, seconds: Mapping[str, Callable[[], float]], turns: int
) -> str:
    """Time "plain", "whole" and "skipping", which take turns behind a first one that does not count.

    Returns:
        The medians in ms, and by how much less skipping takes than whole rows, pair by pair, beside the bound.
    """
    for measure in seconds.values():
        measure()
    taken: dict[str, list[float]] = {name: [] for name in seconds}
    for _ in range(turns):
        for name, measure in seconds.items():
            taken[name].append(measure())
    saved = statistics.median(1 - a / b for a, b in zip(taken["skipping"], taken["whole"]))
    times = " | ".join(f"{1000 * statistics.median(taken[name]):.1f}" for name in ("plain", "whole", "skipping"))
    return f"| {context:,} | {trailing} of {num_layers} | {times} | {saved:.1%} | {trailing / num_layers:.1%} |"
