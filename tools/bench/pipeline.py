"""Speed of routed against dense training over a pipeline, and what the K/V on the wire cost.

    torchrun --nproc-per-node 2 -m skv_tools.bench.pipeline CONFIG.yaml parallel.pipeline=2 [section.key=value ...]

Three runs of the same shape take turns, on random tokens: dense; r_cla; and r_cla with sources from the same stage
only, which computes the same and puts no K/V on the wire. Prints a Markdown table of medians and their ratios.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from skv_dist.commands.arguments import ArgumentParser
from skv_dist.commands.entry_point import entry_point
from skv_dist.config.load import load_config
from skv_dist.config.run import RunConfig, derive
from skv_dist.errors import UserError

from .shapes import with_vocabulary

VARIANTS = {
    "dense": ["routing.policy=none"],
    "r_cla": ["routing.policy=r_cla", "routing.within_stage=false"],
    "r_cla within stages": ["routing.policy=r_cla", "routing.within_stage=true"],
}


def _batches(run: RunConfig, world: Any, count: int) -> list[Any]:
    import torch

    from skv_dist.data.batches import MicroBatch

    shape = (run.train.micro_batch_size, run.data.sequence_length)
    generator = torch.Generator().manual_seed(world.data_rank)
    batches = []
    for local in range(count):
        tokens = torch.randint(0, run.vocab_size, shape, generator=generator)
        index = local * world.data_size + world.data_rank
        sources = torch.zeros(len(tokens), dtype=torch.int64)
        batch = MicroBatch(index, tokens, tokens.roll(-1, 1), torch.ones(shape), None, sources)
        batches.append(batch.to(world.device))
    return batches


@entry_point
def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="bench.pipeline", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each run, taking turns (default: 15)")
    arguments = parser.parse_intermixed_args(argv)
    runs = {
        name: with_vocabulary(load_config(arguments.config, [*arguments.overrides, *keys]))
        for name, keys in VARIANTS.items()
    }
    first = runs["dense"]
    if first.parallel.pipeline < 2:
        raise UserError("parallel.pipeline must be at least 2: there is no wire otherwise")

    import torch
    import torch.distributed as dist

    from skv_dist.parallel.engines.create import create_engine
    from skv_dist.parallel.processes import groups, launcher
    from skv_dist.parallel.run_batch import count_predictions, run_batch
    from skv_dist.routing.draw import DrawKey

    from .machine import heading, layout, synchronize

    derived = derive(first, launcher.world_size())
    world = groups.start(first.parallel)
    engines = {name: create_engine(run, world.device) for name, run in runs.items()}
    batches = _batches(first, world, derived.num_micro_batches)
    num_predictions = count_predictions(batches)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    wire_bytes = dict.fromkeys(runs, 0)  # sent by this rank
    for turn in range(arguments.rounds + 2):  # the first two warm up
        for name, run in runs.items():
            policy = run.policy()
            plans = [policy.plan(DrawKey(run.train.seed, turn, batch.index)) for batch in batches]
            dist.barrier()
            began = time.perf_counter()
            outcome = run_batch(engines[name], run, batches, plans, num_predictions=num_predictions, train=True)
            engines[name].step()
            synchronize(world.device)
            dist.barrier()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
                wire_bytes[name] += outcome.wire_bytes
    sent = torch.tensor(list(wire_bytes.values()), device=world.device)
    dist.all_reduce(sent)
    if world.is_first:
        print(f"{heading(world.device)}; {layout(first, derived)}\n")
        print(f"`python -m skv_tools.bench.pipeline {' '.join(sys.argv[1:])}`\n")
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        mib_per_step = [count / arguments.rounds / 2**20 for count in sent.tolist()]
        print(_table(medians, derived.tokens_per_step, mib_per_step))
    for engine in engines.values():
        engine.close()
    groups.stop()
    return 0


def _table(medians: dict[str, float], tokens_per_step: int, mib_per_step: list[float]) -> str:
    """Median seconds of a step and what was sent in one, for each of `VARIANTS`."""
    text = "| run | median step (s) | tokens/s | against dense | sent per step (MiB) |\n|---|---|---|---|---|\n"
    for (name, median), mib in zip(medians.items(), mib_per_step):
        text += f"| {name} | {median:.4f} | {tokens_per_step / median:,.0f} | {medians['dense'] / median:.3f} | "
        text += f"{mib:.3f} |\n"
    routed = medians["r_cla"]
    return f"{text}\nK/V on the wire: {(routed - medians['r_cla within stages']) / routed:.1%} of the routed step"


if __name__ == "__main__":
    raise SystemExit(main())
