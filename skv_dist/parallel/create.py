"""The engine for a ZeRO stage."""

import torch

from skv_dist.config.run import RunConfig
from skv_dist.parallel.engine import Engine


def create_engine(run: RunConfig, vocab_size: int, device: torch.device) -> Engine:
    """Build the model and the engine that ``parallel.zero_stage`` asks for. Process groups must exist."""
    if run.parallel.zero_stage == 0:
        from skv_dist.parallel.replicated import ReplicatedEngine

        return ReplicatedEngine(run, vocab_size, device)
    from skv_dist.parallel.zero import ZeroEngine

    return ZeroEngine(run, vocab_size, device)
