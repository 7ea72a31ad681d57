"""Figures of a study: loss by share of the cache, loss by step, and the full cache against half of it."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skv_dist.errors import UserError

from .page import Result
from .runs import Run

FULL, HALF = "1.00", "0.50"


def plot(runs: Sequence[Run], folder: Path) -> None:
    """Write ``retention.png``, ``steps.png`` and ``full_and_half.png`` from the runs that are finished.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'skv-dist[plot]'") from error
    matplotlib.use("Agg")
    results: dict[str, list[Result]] = {}
    for run in runs:
        if run.record is not None:
            results.setdefault(run.variant, []).append(Result(run.folder))
    folder.mkdir(parents=True, exist_ok=True)
    _by_share(results, folder / "retention.png")
    _by_step(results, folder / "steps.png")
    _full_and_half(results, folder / "full_and_half.png")


def _axes(results: dict[str, list[Result]]) -> tuple[Any, Any]:
    """A figure, and axes on which no two variants have the same colour and mark."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.set_prop_cycle(
        color=[pyplot.get_cmap("tab10")(number % 10) for number in range(len(results))],
        marker=["os^vD"[number // 10 % 5] for number in range(len(results))],
    )
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, file: Path) -> None:
    from matplotlib import pyplot

    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def _by_share(results: dict[str, list[Result]], file: Path) -> None:
    figure, axes = _axes(results)
    for name, seeds in results.items():
        last = [one.losses[max(one.losses)] for one in seeds]
        shares = sorted(last[0], key=float, reverse=True)
        values = [[losses[share] for losses in last] for share in shares]
        errors = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        percent = [100 * float(share) for share in shares]
        axes.errorbar(percent, [statistics.mean(v) for v in values], yerr=errors, capsize=2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([100, 50, 33, 25, 12.5], ["100", "50", "33", "25", "12.5"])
    axes.invert_xaxis()
    axes.set_xlabel("share of layers that keep a cache, %")
    axes.set_ylabel("validation loss, nats per token (mean and deviation over seeds)")
    _save(figure, axes, file)


def _by_step(results: dict[str, list[Result]], file: Path) -> None:
    figure, axes = _axes(results)
    for name, seeds in results.items():
        steps = sorted(seeds[0].losses)
        axes.plot(steps, [statistics.mean(one.losses[step][FULL] for one in seeds) for step in steps], label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss at 100 % of the cache, nats per token")
    _save(figure, axes, file)


def _full_and_half(results: dict[str, list[Result]], file: Path) -> None:
    figure, axes = _axes(results)
    for name, seeds in results.items():
        last = [one.losses[max(one.losses)] for one in seeds]
        axes.plot([one[FULL] for one in last], [one[HALF] for one in last], linestyle="", label=name)
    axes.set_xlabel("validation loss at 100 % of the cache")
    axes.set_ylabel("validation loss at 50 % of the cache")
    _save(figure, axes, file)
