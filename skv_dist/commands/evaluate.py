"""``skv-eval``: the loss of a checkpoint at several cache sizes, and text sampled from it."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from skv_dist.commands.entry_point import entry_point
from skv_dist.config.run import RunConfig, derive
from skv_dist.errors import UserError
from skv_dist.routing import RoutePlan, map_from_cached_layers

if TYPE_CHECKING:  # torch is imported once the configuration is known to be good
    from skv_dist.data.tokenizer import Tokenizer
    from skv_dist.parallel.engines.base import Engine
    from skv_dist.parallel.processes.groups import World


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skv-eval", description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="a folder such as RUN/checkpoints/step_00000100; RUN means its newest"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="change the checkpoint's configuration; it is laid out over one process unless parallel.* says otherwise",
    )
    parser.add_argument("--retention", type=float, nargs="+", metavar="R", help="default: eval.retention")
    parser.add_argument(
        "--cached-layers",
        type=int,
        nargs="+",
        action="append",
        default=[],
        metavar="L",
        help="also measure the map in which only these layers keep a cache (may be given several times)",
    )
    parser.add_argument("--samples", type=int, help="validation sequences to use (default: eval.samples)")
    parser.add_argument("--json", type=Path, help="also write the losses to this file")
    parser.add_argument("--prompt", help="sample text that goes on from here, under each map")
    parser.add_argument("--new-tokens", type=int, default=200, help="length of sampled text (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


@entry_point
def main(argv: list[str]) -> int:
    from skv_dist.checkpoint.kinds import checkpoint_at

    arguments = _parser().parse_args(argv)
    arguments.checkpoint = checkpoint_at(arguments.checkpoint)
    run = _configuration(arguments)

    from skv_dist.checkpoint.folder import CONFIG, read_state
    from skv_dist.checkpoint.frozen_model import frozen_model
    from skv_dist.checkpoint.travelling import tokenizer_of
    from skv_dist.data.open import open_data
    from skv_dist.data.split import rule_of
    from skv_dist.evaluation.sweep import evaluation_batches, sweep
    from skv_dist.parallel.processes import groups
    from skv_dist.parallel.processes.rendezvous import wait_for_all

    plans = _plans(arguments, run)
    tokenizer = tokenizer_of(arguments.checkpoint, run.data.tokenizer)
    world = groups.start(run.parallel)
    engine = frozen_model(run, arguments.checkpoint, world)
    rule = rule_of(read_state(arguments.checkpoint), run.data, run.checkpoint.allow_changed)
    _, validation = open_data(run.data, tokenizer, run.train.seed, wait_for_all, rule=rule)
    losses: dict[str, float] = {}
    if validation is not None:
        losses = sweep(engine, run, evaluation_batches(run, world, validation), plans)
    elif arguments.prompt is None:
        config = arguments.checkpoint / CONFIG
        raise UserError(f"{config}: data holds out no validation text: set data.validation_fraction")
    for name, plan in plans.items():
        if world.is_first and losses:
            num_owners = len(set(plan.table))
            print(f"{name:<16} {losses[name]:.4f} nats/token   {num_owners} of {plan.num_layers} layers cached")
        if arguments.prompt is not None:
            _print_sample(arguments, run, world, engine, tokenizer, name, plan)
    if world.is_first and arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(losses, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {arguments.json}: {error.strerror}") from error
    groups.stop()
    return 0


def _configuration(arguments: argparse.Namespace) -> RunConfig:
    """The checkpoint's configuration with what the command line asks for, checked against the number of processes."""
    from skv_dist.checkpoint.frozen_model import config_of
    from skv_dist.parallel.processes import launcher

    asked = [] if arguments.retention is None else [f"eval.retention={json.dumps(arguments.retention)}"]
    if arguments.samples is not None:
        asked.append(f"eval.samples={arguments.samples}")
    run = config_of(arguments.checkpoint, [*asked, *arguments.overrides])
    if arguments.new_tokens < 1 or arguments.temperature < 0:
        raise UserError("--new-tokens must be at least 1 and --temperature at least 0")
    derive(run, launcher.world_size())
    return run


def _plans(arguments: argparse.Namespace, run: RunConfig) -> dict[str, RoutePlan]:
    """The sharing maps to measure, by the name of their loss."""
    from skv_dist.evaluation.sweep import retention_plans

    plans = retention_plans(run)
    for layers in arguments.cached_layers:
        table = map_from_cached_layers(run.model.num_layers, layers)
        plans[f"loss@layers {','.join(map(str, sorted(set(layers))))}"] = RoutePlan(table)
    return plans


def _print_sample(
    arguments: argparse.Namespace,
    run: RunConfig,
    world: "World",
    engine: "Engine",
    tokenizer: "Tokenizer",
    name: str,
    plan: RoutePlan,
) -> None:
    from skv_dist.checkpoint.travelling import end_tokens, origin_of
    from skv_dist.evaluation.generate import Sampling, sample_text

    ends = frozenset(end_tokens(origin_of(arguments.checkpoint), tokenizer))
    sampling = Sampling(arguments.new_tokens, arguments.temperature, run.train.seed, ends)
    text = sample_text(engine, run, tokenizer, plan, arguments.prompt, sampling)
    if world.is_first:
        print(f"--- sampled under {name.removeprefix('loss')}\n{arguments.prompt}{text}\n---", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
