"""``skv-eval compare RUN ...``: the last loss of several runs by cache size, as table and plot."""

from pathlib import Path

from skv_dist.commands.arguments import ArgumentParser
from skv_dist.errors import UserError
from skv_dist.evaluation.comparison import last_losses, plot_losses, retention_table


def compare_runs(argv: list[str]) -> int:
    """The command behind its name.

    Raises:
        UserError: a run has no evaluation, or the runs have none in common.
    """
    parser = ArgumentParser(
        prog="skv-eval compare",
        description=__doc__,
        epilog="example: skv-eval compare runs/routed runs/dense --out runs/comparison",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for retention.md and retention.png")
    arguments = parser.parse_args(argv)
    runs = {run.name: last_losses(run) for run in arguments.runs}
    text = retention_table(runs)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "retention.md").write_text(text)
        plot_losses(runs, arguments.out / "retention.png")
    except OSError as error:
        raise UserError(f"cannot write to {arguments.out}: {error.strerror}") from error
    print(text)
    print(f"saved {arguments.out / 'retention.md'} and {arguments.out / 'retention.png'}")
    return 0
