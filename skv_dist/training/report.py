"""What a run says about itself before its first step."""

import importlib.metadata
import platform

import torch

from skv_dist.config.run import Derived, RunConfig
from skv_dist.parallel.build import partitioned_shape
from skv_dist.parallel.engine import Engine
from skv_dist.parallel.groups import World
from skv_dist.routing import map_from_retention
from skv_dist.training.schedule import warmup_steps


def start_report(run: RunConfig, derived: Derived, world: World, engine: Engine, vocab_size: int) -> str:
    """The derived values of the run, one a line."""
    train, parallel, model = run.train, run.parallel, run.model
    held = sum(torch.Size(partitioned_shape(p)).numel() for p in engine.root.parameters())
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    packages = ("torch", "megatron-core", "deepspeed")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    routing: str = run.routing.policy
    if routing in ("r_cla", "rd_cla"):
        routing += f" (cross_prob {run.routing.cross_prob})"
    caches = ", ".join(
        f"{r:.2f} -> {len(set(map_from_retention(model.num_layers, r)))} of {model.num_layers} layers"
        for r in run.eval.retention
    )
    lines = {
        "software": f"Python {platform.python_version()}, {versions}",
        "processes": f"{derived.world_size} on {device}: tensor {parallel.tensor}"
        f"{' with sequence parallelism' if parallel.sequence_parallel else ''} x data {derived.data_parallel}, "
        f"ZeRO {parallel.zero_stage}, {train.precision}",
        "model": f"{model.num_layers} layers x {model.hidden_size}, vocabulary {vocab_size:,}, "
        f"{held:,} parameters on this rank",
        "routing": routing,
        "batch": f"{train.global_batch_size} sequences x {run.data.sequence_length} = {derived.tokens_per_step:,} "
        f"tokens a step, in {derived.num_micro_batches} micro-batches of {train.micro_batch_size} per replica",
        "run": f"{train.steps:,} steps, {train.steps * derived.tokens_per_step:,} tokens, "
        f"{warmup_steps(run.optimizer, train.steps):,} steps of warm-up, then {run.optimizer.schedule}",
        "cached": caches,
        "output": train.output_dir,
    }
    return "\n".join(f"{name + ':':<11}{value}" for name, value in lines.items())
