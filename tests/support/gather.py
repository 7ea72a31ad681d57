"""Full parameters from all ranks, under global names, as a single process would hold them."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.parallel.engines.base import Engine, Quantity
from skv_dist.parallel.tensor_split import split_of


def full_parameters(engine: Engine, run: RunConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, fp32 tensor) one at a time, on every rank, in the order of the layers. Collective over all ranks."""
    group = parallel_state.get_pipeline_model_parallel_group()
    held = dict(engine.model.named())
    everywhere: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(everywhere, list(held), group=group)
    stages = {name: stage for stage, names in enumerate(everywhere) for name in names}
    for name in sorted(stages, key=_place):
        full = _joined(engine, run, name, held[name]) if name in held else None
        yield name, _from_stage(full, stages[name], group, engine.model.device)


def _place(name: str) -> tuple[int, str]:
    """Embedding, layers by number, then the rest."""
    first, *rest = name.split(".")
    if first == "layers":
        return 1 + int(rest[0]), name
    return (0, name) if first == "embedding" else (2**31, name)


def _joined(engine: Engine, run: RunConfig, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    part = engine.read(parameter, Quantity.WEIGHT).contiguous()
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part, group=group)
    return split_of(name, run).join(parts)


def _from_stage(full: torch.Tensor | None, stage: int, group: dist.ProcessGroup, device: torch.device) -> torch.Tensor:
    if group.size() > 1:
        shape = [None if full is None else full.shape]
        source = dist.get_global_rank(group, stage)
        dist.broadcast_object_list(shape, source, group=group)
        if full is None:
            full = torch.empty(shape[0], dtype=torch.float32, device=device)  # type: ignore[arg-type]
        dist.broadcast(full, source, group=group)
    assert full is not None
    return full
