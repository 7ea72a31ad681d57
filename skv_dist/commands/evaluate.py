"""``skv-eval``: the loss of a checkpoint at several cache sizes, and text sampled from it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from skv_dist.commands import maps
from skv_dist.commands.arguments import ArgumentParser
from skv_dist.commands.entry_point import entry_point
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.routing import RoutePlan

if TYPE_CHECKING:  # torch is imported once the configuration is known to be good
    from skv_dist.data.tokenizer import Tokenizer
    from skv_dist.parallel.engines.base import Engine
    from skv_dist.parallel.processes.groups import World


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="skv-eval",
        description=__doc__,
        epilog="example: skv-eval RUN --retention 1 0.5 --prompt 'Once upon a time'. Other commands, each with --help: "
        "skv-eval questions CHECKPOINT FILE scores answers to questions, skv-eval harness CHECKPOINT --tasks TASK ... "
        "runs lm-evaluation-harness, skv-eval search CHECKPOINT looks for the layers whose cache is worth most, "
        "skv-eval compare RUN ... sets the last losses of runs side by side",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a folder such as RUN/checkpoints/step_00000100; RUN means its newest"
    )
    maps.add_arguments(parser)
    maps.add_data(parser)
    parser.add_argument("--samples", type=int, help="validation sequences to use (default: eval.samples)")
    parser.add_argument(
        "--prompt",
        help="sample text that goes on from here, under each map; losses are then measured only where --samples, "
        "--data or --json asks for them",
    )
    parser.add_argument("--new-tokens", type=int, default=200, help="length of sampled text (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    return parser


@entry_point
def main(argv: list[str]) -> int:
    if argv and argv[0] == "questions":
        from skv_dist.commands.evaluate_questions import evaluate_questions

        return evaluate_questions(argv[1:])
    if argv and argv[0] == "harness":
        from skv_dist.commands.evaluate_harness import evaluate_harness

        return evaluate_harness(argv[1:])
    if argv and argv[0] == "search":
        from skv_dist.commands.search_layers import search_layers

        return search_layers(argv[1:])
    if argv and argv[0] == "compare":
        from skv_dist.commands.compare_runs import compare_runs

        return compare_runs(argv[1:])
    from skv_dist.checkpoint.kinds import checkpoint_at

    arguments = maps.parse(_parser(), argv)
    arguments.checkpoint = checkpoint_at(arguments.checkpoint)
    run = _configuration(arguments)

    from skv_dist.checkpoint.frozen_model import frozen_model
    from skv_dist.checkpoint.travelling import tokenizer_of
    from skv_dist.commands.validation import nothing_held_out, validation_samples
    from skv_dist.evaluation.sweep import evaluation_batches, sweep
    from skv_dist.parallel.processes import groups

    plans = maps.plans(arguments, run)
    tokenizer = tokenizer_of(arguments.checkpoint, run.data.tokenizer)
    world = groups.start(run.parallel)
    engine = frozen_model(run, arguments.checkpoint, world)
    losses: dict[str, float] = {}
    if arguments.prompt is None or any((arguments.samples, arguments.data, arguments.json)):
        validation = validation_samples(arguments.checkpoint, run)
        if validation is None:
            raise nothing_held_out(arguments.checkpoint)
        losses = sweep(engine, run, evaluation_batches(run, world, validation), plans, validation.names)
    for name, plan in plans.items():
        if world.is_first and losses:
            print(_lines(name, plan, losses))
        if arguments.prompt is not None:
            _print_sample(arguments, run, world, engine, tokenizer, name, plan)
    if world.is_first and arguments.json is not None:
        maps.write_json(arguments.json, losses)
    groups.stop()
    return 0


def _configuration(arguments: argparse.Namespace) -> RunConfig:
    if arguments.new_tokens < 1 or arguments.temperature < 0:
        raise UserError("--new-tokens must be at least 1 and --temperature at least 0")
    asked = [] if arguments.samples is None else [f"eval.samples={arguments.samples}"]
    return maps.configuration(arguments, asked)


def _lines(name: str, plan: RoutePlan, losses: dict[str, float]) -> str:
    """The loss under one map, and below it the loss on each source, where there are several."""
    total = f"{name:<16} {losses[name]:.4f} nats/token   {len(set(plan.table))} of {plan.num_layers} layers cached"
    on = {key.removeprefix(f"{name}/"): loss for key, loss in losses.items() if key.startswith(f"{name}/")}
    return "\n".join([total, *(f"{'':<16} {loss:.4f} on {source}" for source, loss in on.items())])


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
