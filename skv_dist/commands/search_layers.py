"""``skv-eval search``: which layers should keep their cache, for each budget of memory."""

import argparse
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skv_dist.commands import maps
from skv_dist.commands.arguments import ArgumentParser
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.routing.kinds import first_layers

if TYPE_CHECKING:  # torch is imported once the configuration is known to be good
    from skv_dist.evaluation.search.measured import Measured
    from skv_dist.evaluation.search.progress import Progress
    from skv_dist.evaluation.search.search import Found, Result
    from skv_dist.parallel.engines.base import Engine
    from skv_dist.parallel.processes.groups import World

_RANDOM_SETS = 5


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="skv-eval search",
        description=__doc__,
        epilog="example: skv-eval search RUN --budgets 0.5 0.25 --samples 64 --json layers.json",
    )
    parser.add_argument("checkpoint", type=Path, help="a folder such as RUN/checkpoints/step_00000100; RUN: its newest")
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        metavar="R",
        default=[0.75, 0.5, 0.33, 0.25, 0.125],
        help="parts of the cache that may be kept (default: 0.75 0.5 0.33 0.25 0.125)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        help="validation sequences to search on; as many behind them measure what was found (default: eval.samples)",
    )
    maps.add_data(parser)
    parser.add_argument("--keep", type=int, nargs="+", default=[], metavar="L", help="layers that keep their cache")
    parser.add_argument("--apart", type=int, metavar="N", help="at most so many layers use one cache")
    parser.add_argument(
        "--stages",
        type=int,
        default=1,
        metavar="P",
        help="equal pipeline stages of the deployment, which no map may cross (vLLM refuses such)",
    )
    parser.add_argument("--free-sources", action="store_true", help="a sharer may use any owner, not only the nearest")
    parser.add_argument("--json", type=Path, help="write what was found to this file, for exports and training")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw loss over budget to this file, such as front.png"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    maps.describe_overrides(parser)
    return parser


def search_layers(argv: list[str]) -> int:
    """The command behind its name.

    Raises:
        UserError: the checkpoint or an argument is not what it should be.
    """
    from skv_dist.checkpoint.kinds import checkpoint_at

    arguments = maps.parse(_parser(), argv)
    arguments.checkpoint = checkpoint_at(arguments.checkpoint)
    if arguments.samples is not None and arguments.samples < 2:
        raise UserError(f"--samples must be at least 2, of which differences get their error, got {arguments.samples}")
    if arguments.plot is not None:
        from skv_dist.evaluation.search.front import check_plottable

        check_plottable(arguments.plot)
    asked = [] if arguments.samples is None else [f"eval.samples={arguments.samples}"]
    run = maps.configuration(arguments, asked)

    from skv_dist.evaluation.search.constraints import Constraints
    from skv_dist.evaluation.search.search import search, sizes

    layers, kinds = run.model.num_layers, run.model.layer_kinds
    constraints = Constraints.of(layers, arguments.keep, arguments.apart, arguments.stages, kinds)
    sizes(arguments.budgets, constraints)

    from skv_dist.checkpoint.frozen_model import frozen_model
    from skv_dist.parallel.processes import groups

    world = groups.start(run.parallel)
    engine = frozen_model(run, arguments.checkpoint, world)
    progress = _progress(arguments, run, world)
    seen, unseen = _measured(arguments, run, world, engine, progress)
    result = search(seen, arguments.budgets, constraints, free_sources=arguments.free_sources)
    content = _content(arguments, run, result, seen, unseen, constraints.keep)
    if world.is_first:
        print(_table(content))
        if run.routing.policy == "none" and (half := _nearest_half(content["budgets"])) is not None:
            print(
                f"warning: this model was trained without routing, and loses {half['rise']:.3f} nats/token with "
                f"{half['budget']:g} of its cache even so: training with routing.policy=nested and "
                "routing.order_from lets it use these sets"
            )
        if arguments.json is not None:
            maps.write_json(arguments.json, content)
            if progress is not None:
                progress.end()
        if arguments.plot is not None:
            from skv_dist.evaluation.search.front import plot_front

            plot_front(content, run.model.num_layers, arguments.plot)
    groups.stop()
    return 0


def _progress(arguments: argparse.Namespace, run: RunConfig, world: "World") -> "Progress | None":
    """Where measured maps are noted: beside the file that was asked for, unless that is a pipe or a terminal."""
    import hashlib

    from skv_dist.checkpoint.folder import MANIFEST, digest
    from skv_dist.config.load import dump_config
    from skv_dist.evaluation.search.progress import Progress
    from skv_dist.evaluation.search.sequences import FEWEST

    if arguments.json is None or (arguments.json.exists() and not arguments.json.is_file()):
        return None
    # Replicas share out sequences, and parts follow from the size of the first: both say which sums are whose.
    order = f"{world.data_size} {FEWEST}"
    measured_on = f"{digest(arguments.checkpoint / MANIFEST)['sha256']}\n{order}\n{dump_config(run)}"
    identity = hashlib.sha256(measured_on.encode()).hexdigest()
    return Progress(arguments.json.with_name(f"{arguments.json.name}.partial"), identity)


def _measured(
    arguments: argparse.Namespace, run: RunConfig, world: "World", engine: "Engine", progress: "Progress | None"
) -> "tuple[Measured, Measured]":
    """Losses on the sequences of the search, and on as many behind them."""
    from tqdm import tqdm

    from skv_dist.commands.validation import nothing_held_out, validation_samples
    from skv_dist.evaluation.search.measured import Measured, Table
    from skv_dist.evaluation.search.sequences import SequenceLosses, shares_prefixes
    from skv_dist.evaluation.sweep import evaluation_batches
    from skv_dist.parallel.processes.agree import on_first_rank

    samples = validation_samples(arguments.checkpoint, run)
    if samples is None:
        raise nothing_held_out(arguments.checkpoint)
    known = {} if progress is None else on_first_rank(progress.begin)
    if known and world.is_first:
        print(f"going on with {sum(map(len, known.values()))} maps that were measured before", flush=True)
    if world.is_first and not shares_prefixes(run):
        print(
            "pipeline stages measure each map from layer 0 on: without parallel.pipeline a search takes less time",
            flush=True,
        )
    both = []
    for title, first in (("search", 0), ("check", run.eval.samples)):
        losses = SequenceLosses(engine, run, evaluation_batches(run, world, samples, first))
        before = known.get(title, {})
        bar = tqdm(desc=title, unit="sequence", initial=sum(map(len, before.values())), disable=not world.is_first)

        def measure(
            tables: Sequence[Table], part: int, title: str = title, losses: SequenceLosses = losses, bar: Any = bar
        ) -> Any:
            found = losses(tables, part)
            for table, sums in zip(tables, found, strict=True):
                if progress is not None:
                    progress.note(title, table, sums)
                bar.update(len(sums))
            return found

        both.append(Measured(run.model.num_layers, measure, losses.counts, before, run.model.layer_kinds))
    return both[0], both[1]


def _content(
    arguments: argparse.Namespace,
    run: RunConfig,
    result: "Result",
    seen: "Measured",
    unseen: "Measured",
    keep: frozenset[int],
) -> dict[str, Any]:
    """What the file holds: see docs/deployment.md."""
    from skv_dist.checkpoint.folder import MANIFEST, digest
    from skv_dist.routing.found import FORMAT
    from skv_dist.versions import software

    full = tuple(range(run.model.num_layers))
    return {
        "format": FORMAT,
        "checkpoint": str(arguments.checkpoint),
        "fingerprint": digest(arguments.checkpoint / MANIFEST)["sha256"],
        "software": software(),
        "sequences": len(seen.sums(full)),
        "maps_measured": seen.num_measured(),
        "maps_measured_on_all": seen.num_measured(seen.num_parts),
        "order": list(result.order),
        "order_holds_from": result.fewest,
        "full": {"loss": unseen.loss(full), "error": unseen.error(full)},
        "budgets": [_entry(run, found, seen, unseen, keep) for found in result.found],
    }


def _entry(
    run: RunConfig, found: "Found", seen: "Measured", unseen: "Measured", keep: frozenset[int]
) -> dict[str, Any]:
    from skv_dist.evaluation.questions import cache_bytes_per_token
    from skv_dist.routing import RoutePlan

    layers, size = run.model.num_layers, len(found.layers)
    needed = first_layers(layers, run.model.layer_kinds)

    def as_many(candidates: Iterable[int]) -> tuple[int, ...]:
        """So many layers as were found, with those that no map can do without."""
        return tuple(dict.fromkeys([*needed, *candidates]))[:size]

    full, even = tuple(range(layers)), unseen.table_of(as_many(layer * layers // size for layer in range(size)))
    first = as_many(range(size))
    draw = random.Random(size)
    others = sorted(set(range(layers)) - {0})
    sets = [as_many((0, *draw.sample(others, size - 1))) for _ in range(_RANDOM_SETS)]
    unseen.prepare([full, found.table, even, *map(unseen.table_of, [first, *sets])])
    change, beside = unseen.difference(found.table, full), unseen.difference(found.table, even)
    return {
        "budget": found.budget,
        "layers": list(found.layers),
        "kv_source_layers": list(found.table),
        "bytes_per_token": cache_bytes_per_token(run, RoutePlan(found.table)),
        "trailing_sharers": len(RoutePlan(found.table).trailing),
        "loss": unseen.loss(found.table),
        "rise": change.mean,
        "rise_error": change.error,
        "searched_rise": seen.difference(found.table, full).mean,
        "evenly_spread": {"loss": unseen.loss(even), "found_less_this": beside.mean, "error": beside.error},
        "first_layers": {"loss": unseen.loss_of(first)},
        "random_sets": {"loss": sum(unseen.loss_of(each) for each in sets) / len(sets), "sets": _RANDOM_SETS},
    }


def _nearest_half(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The entry whose budget is nearest to one half, of those that leave something out."""
    smaller = [entry for entry in entries if entry["budget"] < 1]
    return min(smaller, key=lambda entry: abs(entry["budget"] - 0.5), default=None)


def _table(content: dict[str, Any]) -> str:
    lines = [
        f"full cache: {content['full']['loss']:.4f} nats/token on {content['sequences']} sequences that the search has "
        f"not seen; {content['maps_measured']} maps measured, {content['maps_measured_on_all']} of them on all of the "
        "search's own",
        f"{'budget':>6} {'layers':>6} {'bytes/token':>11} {'rise':>8} {'error':>7} {'evenly':>8} {'first':>8} "
        f"{'random':>8}  layers that keep their cache",
    ]
    full = content["full"]["loss"]
    for entry in content["budgets"]:
        others = (entry[name]["loss"] - full for name in ("evenly_spread", "first_layers", "random_sets"))
        lines.append(
            f"{entry['budget']:>6.3g} {len(entry['layers']):>6} {entry['bytes_per_token']:>11,} {entry['rise']:>8.4f} "
            f"{entry['rise_error']:>7.4f} {' '.join(f'{other:>8.4f}' for other in others)}  "
            f"{','.join(map(str, entry['layers']))}"
        )
    lines.append(f"order, the most needed first: {','.join(map(str, content['order']))}")
    return "\n".join(lines)
