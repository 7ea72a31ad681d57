"""What a save sends, and what each rank writes in it."""

from typing import Any
from unittest.mock import patch

from tests.support.engine import built, made_engine


def snapshot_of(settings: dict[str, Any]) -> tuple[list[str], int, int]:
    """(collectives that were called, elements that this rank copied, elements of the largest parameter)."""
    import torch
    import torch.distributed as dist

    from skv_dist.checkpoint.shards import snapshot
    from skv_dist.parallel.local_model import partitioned_shape

    called: list[str] = []
    names = ["all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce", "send"]

    def noted(name: str) -> Any:
        right = getattr(dist, name)

        def call(*args: Any, **given: Any) -> Any:
            called.append(name)
            return right(*args, **given)

        return call

    with built(settings) as (run, world), made_engine(run, world) as engine:
        engine.prepare_moments()
        with patch.multiple(dist, **{name: noted(name) for name in names}):
            shards = snapshot(engine, run)
        copied = sum(block.numel() for pieces in shards.values() for block in pieces._blocks.values())
        largest = max(torch.Size(partitioned_shape(p)).numel() for p in engine.model.parameters())
        return called, copied, largest
