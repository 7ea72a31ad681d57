"""The last evaluations of several runs, side by side: a table and a plot."""

import json
from collections.abc import Mapping
from pathlib import Path

from skv_dist.checkpoint.folder import METRICS
from skv_dist.errors import UserError

LOSS = "eval/loss@"


def losses_by_retention(metrics: Mapping[str, float]) -> dict[str, float]:
    """``0.50`` and so on to the loss at that retention, of a line of metrics; without those by source."""
    losses = {name.removeprefix(LOSS): loss for name, loss in metrics.items() if name.startswith(LOSS)}
    return {retention: loss for retention, loss in losses.items() if "/" not in retention}


def last_losses(run: Path) -> dict[float, float]:
    """Retention to loss (nats per token) at the last evaluation of a run.

    Raises:
        UserError: the run has no evaluation.
    """
    file = run / METRICS
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    for number in range(len(lines), 0, -1):
        try:
            metrics = json.loads(lines[number - 1])
        except ValueError as error:
            raise UserError(f"{file}:{number}: not JSON") from error
        losses = {float(retention): float(loss) for retention, loss in losses_by_retention(metrics).items()}
        if losses:
            return losses
    raise UserError(f"{file} holds no evaluation")


def retention_table(runs: dict[str, dict[float, float]]) -> str:
    """Markdown: a row per run; behind each loss at less than 100 %, its rise over the run's own loss at 100 %."""
    retentions = sorted(set.intersection(*(set(losses) for losses in runs.values())), reverse=True)
    if 1.0 not in retentions:
        raise UserError("the runs share no evaluation at retention 1.0, over which a rise is measured")
    lines = [
        "| loss (nats/token) | " + " | ".join(f"{r:.0%} of the cache" for r in retentions) + " |",
        "|---|" + "---|" * len(retentions),
    ]
    for name, losses in runs.items():
        cells = [f"{losses[r]:.3f}" + (f" ({losses[r] - losses[1.0]:+.3f})" if r < 1 else "") for r in retentions]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_losses(runs: dict[str, dict[float, float]], file: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("a plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, losses in runs.items():
        retentions = sorted(losses, reverse=True)
        axes.plot([100 * r for r in retentions], [losses[r] for r in retentions], marker="o", label=name)
    axes.invert_xaxis()
    axes.set_xlabel("KV cache kept (% of layers)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
