"""``skv-eval harness``: tasks of EleutherAI's lm-evaluation-harness at several cache sizes, without an export."""

import argparse
import importlib.metadata
import os
from pathlib import Path
from typing import Any

from skv_dist import __version__
from skv_dist.commands import maps
from skv_dist.commands.arguments import ArgumentParser
from skv_dist.errors import UserError

_CURE = "pip install 'skv-dist[harness]'"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="skv-eval harness",
        description=__doc__,
        epilog="example: skv-eval harness RUN --tasks hellaswag arc_easy --retention 1 0.5 0.25 --limit 500. Needs "
        f"the package lm_eval: {_CURE}",
    )
    parser.add_argument("checkpoint", type=Path, help="a folder such as RUN/checkpoints/step_00000100; RUN: its newest")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="tasks, groups or patterns")
    maps.add_arguments(parser)
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="look for tasks in this folder too")
    parser.add_argument("--limit", type=int, help="take the first so many documents of each task (default: all)")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question (default: as the task says)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences computed together (default: 16)")
    parser.add_argument("--chat", action="store_true", help="give prompts through the chat template")
    parser.add_argument(
        "--log-samples", action="store_true", help="also write each document with its answers to the file of --json"
    )
    return parser


def evaluate_harness(argv: list[str]) -> int:
    """The command behind its name.

    Raises:
        UserError: lm_eval is missing, or a task, the checkpoint or an argument is not what it should be.
    """
    from skv_dist.checkpoint.kinds import checkpoint_at

    arguments = maps.parse(_parser(), argv)
    _check(arguments)
    version = _version_of_lm_eval()
    arguments.checkpoint = checkpoint_at(arguments.checkpoint)
    run = maps.configuration(arguments, [])

    from skv_dist.checkpoint.frozen_model import frozen_model
    from skv_dist.checkpoint.travelling import end_tokens, origin_of, tokenizer_of
    from skv_dist.evaluation.harness import HarnessModel
    from skv_dist.evaluation.harness_tasks import load_tasks, quiet_unless, run_tasks
    from skv_dist.evaluation.questions import cache_bytes_per_token
    from skv_dist.parallel.processes import groups

    plans = {name.removeprefix("loss@"): plan for name, plan in maps.plans(arguments, run).items()}
    tokenizer = tokenizer_of(arguments.checkpoint, run.data.tokenizer)
    ends = frozenset(end_tokens(origin_of(arguments.checkpoint), tokenizer))
    with quiet_unless(os.environ.get("RANK", "0") == "0"):
        tasks = load_tasks(
            arguments.tasks, arguments.include_path, arguments.num_fewshot, run.model.max_position_embeddings
        )
    world = groups.start(run.parallel)
    engine = frozen_model(run, arguments.checkpoint, world)
    found: dict[str, dict[str, Any]] = {}
    for name, plan in plans.items():
        model = HarnessModel(engine, run, world, tokenizer, plan, ends, arguments.batch_size)
        with quiet_unless(world.is_first):
            results = run_tasks(
                model,
                tasks,
                limit=arguments.limit,
                chat=arguments.chat,
                log_samples=arguments.log_samples,
                first=world.is_first,
            )
        found[name] = {
            "cached_layers": len(set(plan.table)),
            "cache_bytes_per_token": cache_bytes_per_token(run, plan),
            **results,
        }
    if world.is_first:
        print(_table(found, run.model.num_layers))
        if arguments.json is not None:
            maps.write_json(arguments.json, {"lm_eval": version, "skv_dist": __version__, "maps": found})
    groups.stop()
    return 0


def _check(arguments: argparse.Namespace) -> None:
    least = {"limit": 1, "batch_size": 1, "num_fewshot": 0}
    for name, bound in least.items():
        given = getattr(arguments, name)
        if given is not None and given < bound:
            raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, got {given}")
    if arguments.log_samples and arguments.json is None:
        raise UserError("--log-samples writes to the file of --json, which is not given")


def _version_of_lm_eval() -> str:
    """Raises UserError where there is none that can be used."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"skv-eval harness needs the package lm_eval, which cannot be imported ({error}): {_CURE}"
        ) from error
    version = importlib.metadata.version("lm_eval")
    if not hasattr(TaskManager, "load"):
        raise UserError(f"skv-eval harness needs lm_eval 0.4.12 or newer, and {version} is installed: {_CURE}")
    return version


def _table(found: dict[str, dict[str, Any]], num_layers: int) -> str:
    """A line for each metric of each task, a column for each map."""
    rows: dict[tuple[str, str], list[str]] = {}
    for results in found.values():
        for task, metrics in results["results"].items():
            for key, value in metrics.items():
                metric, _, name_of_filter = key.partition(",")
                if metric.endswith("_stderr") or not name_of_filter or not isinstance(value, float | int):
                    continue
                shown = metric if name_of_filter == "none" else f"{metric} ({name_of_filter})"
                error = metrics.get(f"{metric}_stderr,{name_of_filter}")
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                rows.setdefault((task, shown), []).append(f"{value:.4f}{spread}")
    lines = [
        ["task", "metric", *found],
        ["", "cached layers", *(f"{of_map['cached_layers']} of {num_layers}" for of_map in found.values())],
        ["", "bytes/token", *(f"{of_map['cache_bytes_per_token']:,}" for of_map in found.values())],
        *([*names, *values] for names, values in rows.items()),
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths)) for line in lines)
    )
