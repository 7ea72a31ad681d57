"""Full parameters from all ranks, under global names, as a single process would hold them."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.model.sharding import join, kind_of
from skv_dist.parallel.engine import Engine


def full_parameters(engine: Engine, run: RunConfig, vocab_size: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, fp32 tensor) one at a time, on every rank. Collective over tensor- and data-parallel ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    for name, parameter in engine.root.named():
        part = engine.parameter(parameter).contiguous()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part, group=group)
        yield name, join(parts, kind_of(name, run.model.gated), vocab_size)
