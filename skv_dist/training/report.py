"""What a run says about itself before its first step."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import Derived, RunConfig
from skv_dist.model.megatron_config import DTYPES
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.engines.create import is_sharded
from skv_dist.parallel.local_model import partitioned_shape
from skv_dist.parallel.processes.groups import World
from skv_dist.parallel.tensor_split import split_of
from skv_dist.parallel.wire.packing import Packing
from skv_dist.training.schedule import warmup_steps
from skv_dist.versions import software

_CPU_INFO = Path("/proc/cpuinfo")


def _lacks_bf16(cpu_info: Path) -> bool:
    """Whether the processor says that it cannot multiply in bf16; False where it says nothing."""
    try:
        words = set(cpu_info.read_text(encoding="utf-8", errors="replace").lower().split())
    except OSError:
        return False
    return bool(words & {"flags", "features"}) and not words & {"avx512_bf16", "amx_bf16", "bf16"}


class Parameters(NamedTuple):
    """How many there are.

    Attributes:
        whole, frozen: of the whole model, each once, whatever the layout.
        here: on this rank, with what pads the vocabulary.
    """

    whole: int
    frozen: int
    here: int

    def __str__(self) -> str:
        here = f", {self.here:,} on this rank" if self.here != self.whole else ""
        frozen = f"; {self.frozen:,} of them frozen" if self.frozen else ""
        return f"{self.whole:,} parameters{here}{frozen}"


def count_parameters(run: RunConfig, engine: Engine) -> Parameters:
    """Collective."""
    sizes, here = {}, 0
    for name, parameter in engine.model.named():
        part = partitioned_shape(parameter)
        here += math.prod(part)
        sizes[name] = math.prod(split_of(name, run).full_shape(part)), parameter.requires_grad
    group = parallel_state.get_pipeline_model_parallel_group()
    of_stages: list[Any] = [None] * group.size()
    dist.all_gather_object(of_stages, sizes, group=group)
    whole = {name: size for stage in of_stages for name, size in stage.items()}
    return Parameters(
        sum(size for size, _ in whole.values()), sum(size for size, learns in whole.values() if not learns), here
    )


def start_report(
    run: RunConfig,
    derived: Derived,
    world: World,
    parameters: Parameters,
    begins: str,
    num_sequences: int | None = None,
) -> str:
    """The derived values of the run, one a line.

    Args:
        begins: with which weights.
        num_sequences: of an epoch; None where nobody knows.
    """
    train, parallel, model = run.train, run.parallel, run.model
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    routing: str = run.routing.policy
    if routing in ("r_cla", "rd_cla"):
        routing += f" (cross_prob {run.routing.cross_prob})"
    if run.routing.within_stage:
        routing += ", sources from the same stage only (routing.within_stage: a change of the method)"
    caches = ", ".join(
        f"{r:.2f} -> {len(set(run.sharing_map(r)))} of {model.num_layers} layers" for r in run.eval.retention
    )
    zero = f"ZeRO {parallel.zero_stage}"
    if not is_sharded(parallel, derived.data_parallel):
        zero += " (one replica: nothing to shard)" if parallel.zero_stage else ""
    elif parallel.engine == "fsdp":
        zero += " by fully_shard"
    stages = f" x pipeline {parallel.pipeline}" if parallel.pipeline > 1 else ""
    lines = {
        "software": software(),
        "processes": f"{derived.world_size} on {device}: tensor {parallel.tensor}"
        f"{' with sequence parallelism' if parallel.sequence_parallel else ''}{stages} x data {derived.data_parallel}, "
        f"{zero}, {train.precision}",
        "model": f"{model.num_layers} layers x {model.hidden_size}, vocabulary {run.vocab_size:,}, {parameters}",
        "begins": begins,
        "routing": routing,
        "batch": f"{train.global_batch_size} sequences x {run.data.sequence_length} = {derived.tokens_per_step:,} "
        f"tokens a step, in {derived.num_micro_batches} micro-batches of {train.micro_batch_size} per replica",
        **({} if num_sequences is None else {"data": data_report(run, num_sequences)}),
        "run": f"{train.steps:,} steps, {train.steps * derived.tokens_per_step:,} tokens, "
        f"{warmup_steps(run.optimizer, train.steps):,} steps of warm-up, then {run.optimizer.schedule}",
        **({"teacher": f"{run.teacher}, weight {run.distillation.weight}"} if run.distillation.weight else {}),
        "cached": caches,
        "output": train.output_dir,
        **(
            {"slow": "this CPU has no products of bf16: train.precision=fp32 is many times faster on it"}
            if device == "CPU" and train.precision == "bf16" and _lacks_bf16(_CPU_INFO)
            else {}
        ),
        **(pipeline_report(run, derived) if parallel.pipeline > 1 else {}),
    }
    return "\n".join(f"{name + ':':<11}{value}" for name, value in lines.items())


def data_report(run: RunConfig, num_sequences: int) -> str:
    """How much there is to train on, and how often it is read."""
    epochs = run.train.steps * run.train.global_batch_size / num_sequences
    return (
        f"{num_sequences:,} sequences for training, {num_sequences * run.data.sequence_length:,} tokens; "
        f"{run.train.steps:,} steps read them {epochs:.3g} times"
    )


def pipeline_report(run: RunConfig, derived: Derived) -> dict[str, str]:
    """The schedule's bubble, and what is expected to cross each boundary, from the policy alone."""
    parallel, num_chunks = run.parallel, run.parallel.virtual_pipeline
    # Narayanan et al., arXiv 2104.04473: idle over ideal time of 1F1B is (p - 1) / m, divided by the chunks per rank.
    bubble = (parallel.pipeline - 1) / (derived.num_micro_batches * num_chunks)
    packing, rows = Packing.of(run), run.data.sequence_length // parallel.sequence_split
    column_bytes = rows * run.train.micro_batch_size * DTYPES[run.train.precision].itemsize

    def mebibytes(num_sources: float) -> str:
        columns = packing.hidden_size + num_sources * packing.kv_width
        return f"{columns * column_bytes / 2**20:.3g}"

    boundaries = [
        f"{stage.stop - 1}|{stage.stop}: {mean:.1f} (at most {largest}) K/V, "
        f"{mebibytes(mean)} (at most {mebibytes(largest)}) MiB"
        for stage, (mean, largest) in zip(run.stages, run.policy().expected_crossings(run.stages, run.train.seed))
    ]
    schedule = (
        "1F1B" if num_chunks == 1 else f"interleaved, {num_chunks} chunks per rank, padded to the widest of the step"
    )
    layers = ", ".join(f"{stage.start}-{stage.stop - 1}" for stage in run.stages)
    return {
        "pipeline": f"{schedule}; layers {layers}; bubble {bubble:.1%} of the ideal time",
        "wire": "per micro-batch, rank and direction, behind layer " + "; ".join(boundaries),
    }
