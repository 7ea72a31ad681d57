"""Speed of routed against dense training over a pipeline, and what the K/V on the wire cost.

    torchrun --nproc-per-node 2 -m skv_tools.bench.pipeline CONFIG.yaml parallel.pipeline=2 [section.key=value ...]

Three runs of the same shape take turns, on random tokens: dense; r_cla; and r_cla with sources from the same stage
only, which computes the same and puts no K/V on the wire. Prints a Markdown table of medians and their ratios.
"""

import argparse
import datetime
import importlib.metadata
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from skv_dist.config.load import load_config
from skv_dist.config.run import RunConfig, derive
from skv_dist.errors import UserError, command

VARIANTS = {
    "dense": ["routing.policy=none"],
    "r_cla": ["routing.policy=r_cla", "routing.within_stage=false"],
    "r_cla within stages": ["routing.policy=r_cla", "routing.within_stage=true"],
}


def _batches(run: RunConfig, world: Any, count: int, vocab_size: int) -> list[Any]:
    import torch

    from skv_dist.data.batches import MicroBatch

    shape = (run.train.micro_batch_size, run.data.sequence_length)
    generator = torch.Generator().manual_seed(world.data_rank)
    made = []
    for local in range(count):
        tokens = torch.randint(0, vocab_size, shape, generator=generator)
        index = local * world.data_size + world.data_rank
        made.append(MicroBatch(index, tokens, tokens.roll(-1, 1), torch.ones(shape), None).to(world.device))
    return made


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bench_pipeline", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each run, taking turns (default: 15)")
    arguments = parser.parse_intermixed_args(argv)
    runs = {name: load_config(arguments.config, [*arguments.overrides, *keys]) for name, keys in VARIANTS.items()}
    first = runs["dense"]
    if first.parallel.pipeline < 2:
        raise UserError("parallel.pipeline must be at least 2: there is no wire otherwise")

    import torch
    import torch.distributed as dist

    from skv_dist.data.tokenizer import load_tokenizer
    from skv_dist.parallel.engines.create import create_engine
    from skv_dist.parallel.processes import groups
    from skv_dist.parallel.run_batch import count_tokens, run_batch
    from skv_dist.routing.draw import DrawKey

    derived = derive(first, groups.world_size_from_environment())
    vocab_size = first.model.vocab_size or load_tokenizer(first.data.tokenizer).vocab_size
    world = groups.start(first.parallel)
    engines = {name: create_engine(run, vocab_size, world.device) for name, run in runs.items()}
    batches = _batches(first, world, derived.num_micro_batches, vocab_size)
    tokens = count_tokens(batches)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    sent = dict.fromkeys(runs, 0)
    for turn in range(arguments.rounds + 2):  # the first two warm up
        for name, run in runs.items():
            policy = run.policy()
            plans = [policy.plan(DrawKey(run.train.seed, turn, batch.index)) for batch in batches]
            dist.barrier()
            began = time.perf_counter()
            outcome = run_batch(engines[name], run, batches, plans, tokens=tokens, train=True)
            engines[name].step()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
                sent[name] += outcome.wire_bytes
    counts = torch.tensor(list(sent.values()), device=world.device)
    dist.all_reduce(counts)
    if world.is_first:
        parallel = first.parallel
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "megatron-core", "deepspeed"))
        print(
            f"{datetime.date.today()}, {device}, Python {platform.python_version()}, {versions}; pipeline "
            f"{parallel.pipeline}, chunks {parallel.virtual_pipeline}, tensor {parallel.tensor}, data "
            f"{derived.data_parallel}, ZeRO {parallel.zero_stage}\n\n`bench_pipeline {' '.join(sys.argv[1:])}`\n"
        )
        print("| run | median step (s) | tokens/s | against dense | sent per step (MiB) |\n|---|---|---|---|---|")
        dense = statistics.median(seconds["dense"])
        for (name, times), count in zip(seconds.items(), counts.tolist()):
            median = statistics.median(times)
            print(
                f"| {name} | {median:.4f} | {derived.tokens_per_step / median:,.0f} | {dense / median:.3f} | "
                f"{count / arguments.rounds / 2**20:.3f} |"
            )
        whole, without = (statistics.median(seconds[name]) for name in ("r_cla", "r_cla within stages"))
        print(f"\nK/V on the wire: {(whole - without) / whole:.1%} of the routed step")
    for engine in engines.values():
        engine.close()
    groups.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
