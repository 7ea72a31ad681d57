"""The figure of a search: what each part of the cache costs in loss, beside sets that were not searched for."""

from pathlib import Path
from typing import Any

from skv_dist.errors import UserError

_BESIDE = (("evenly_spread", "evenly spread"), ("first_layers", "the first layers"), ("random_sets", "random sets"))


def check_plottable(file: Path) -> None:
    """Raises UserError where no figure can be written to ``file``: before a search, not behind it."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'skv-dist[plot]'") from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in kinds:
        raise UserError(f"--plot {file}: a figure is one of .{', .'.join(sorted(kinds))}")
    if not file.parent.is_dir():
        raise UserError(f"--plot {file}: {file.parent} is no folder")


def plot_front(content: dict[str, Any], num_layers: int, file: Path) -> None:
    """Rise of the loss by share of the cache, on sequences that the search has not seen.

    Args:
        content: what ``skv-eval search --json`` writes.
        file: its ending says what kind of figure is written.
    """
    from matplotlib.figure import Figure

    entries = sorted(content["budgets"], key=lambda entry: len(entry["layers"]))
    shares = [100 * len(entry["layers"]) / num_layers for entry in entries]
    full = content["full"]["loss"]
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    errors = [entry["rise_error"] for entry in entries]
    axes.errorbar(shares, [entry["rise"] for entry in entries], yerr=errors, marker="o", capsize=3, label="found")
    for (key, label), mark in zip(_BESIDE, "sv^"):
        axes.plot(shares, [entry[key]["loss"] - full for entry in entries], marker=mark, linestyle=":", label=label)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xlabel("layers that keep their cache, %")
    axes.set_ylabel("loss above the full cache, nats per token")
    axes.set_title(f"{content['sequences']} sequences that the search has not seen")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110, bbox_inches="tight")
