"""The engine for a ZeRO stage."""

import torch
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.parallel.engines.base import Engine


def is_sharded(zero_stage: int, replicas: int) -> bool:
    """Whether ZeRO has something to do: stages 1 and 2 shard over replicas, of which there may be one."""
    return zero_stage == 3 or (zero_stage > 0 and replicas > 1)


def create_engine(run: RunConfig, device: torch.device, *, initialize: bool = True) -> Engine:
    """Build the model and the engine that ``parallel.zero_stage`` asks for.

    Args:
        run: the complete configuration; process groups must exist.
        initialize: draw the initial weights. Else each weight has to be written before the first forward, which
            refuses to run without.

    Raises:
        UserError: see `skv_dist.parallel.freezing.freeze`.
    """
    if not is_sharded(run.parallel.zero_stage, parallel_state.get_data_parallel_world_size()):
        from skv_dist.parallel.engines.replicated import ReplicatedEngine

        return ReplicatedEngine(run, device, initialize=initialize)
    from skv_dist.parallel.engines.zero import ZeroEngine

    return ZeroEngine(run, device, initialize=initialize)
