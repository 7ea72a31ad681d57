"""The engines that a run asks for."""

import torch
from megatron.core import parallel_state

from skv_dist.config.parallel import ParallelConfig
from skv_dist.config.run import RunConfig
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.engines.frozen import FrozenEngine, ShardedFrozenEngine


def is_sharded(parallel: ParallelConfig, replicas: int) -> bool:
    """Whether anything is shared out over the replicas, of which there may be one; DeepSpeed's stage 3 runs with it."""
    return parallel.zero_stage > 0 and (replicas > 1 or (parallel.engine, parallel.zero_stage) == ("deepspeed", 3))


def create_engine(run: RunConfig, device: torch.device, *, initialize: bool = True) -> Engine:
    """Build the model and the engine that ``parallel.engine`` and ``parallel.zero_stage`` ask for.

    Args:
        run: the complete configuration; process groups must exist.
        initialize: draw the initial weights. Else each weight has to be written before the first forward, which
            refuses to run without.

    Raises:
        UserError: see `skv_dist.parallel.freezing.freeze`.
    """
    if not is_sharded(run.parallel, parallel_state.get_data_parallel_world_size()):
        from skv_dist.parallel.engines.replicated import ReplicatedEngine

        return ReplicatedEngine(run, device, initialize=initialize)
    if run.parallel.engine == "fsdp":
        from skv_dist.parallel.engines.fsdp import FsdpEngine

        return FsdpEngine(run, device, initialize=initialize)
    from skv_dist.parallel.engines.zero import ZeroEngine

    return ZeroEngine(run, device, initialize=initialize)


def create_teacher(run: RunConfig, device: torch.device) -> FrozenEngine:
    """The engine of a teacher beside a run: its parameters are sharded where FSDP shards those of the run.

    Args:
        run: that of the teacher, in the layout of the run.
    """
    sharded = run.parallel.engine == "fsdp" and run.parallel.zero_stage == 3
    if sharded and parallel_state.get_data_parallel_world_size() > 1:
        return ShardedFrozenEngine(run, device)
    return FrozenEngine(run, device)
