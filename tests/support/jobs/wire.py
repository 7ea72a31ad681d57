"""What crosses the boundaries of pipeline stages, counted."""

from typing import Any

from tests.support.batches import local_batches
from tests.support.engine import built, drawn_plans, made_engine, run_step
from tests.support.settings import SEQUENCE


def wire(settings: dict[str, Any]) -> dict[str, Any]:
    """One training batch: bytes sent by this rank, and the bytes of received K/V that it held at once (counted)."""
    import weakref
    from unittest import mock

    from skv_dist.parallel.wire.port import ChunkPort

    held: list[Any] = []
    most = 0
    right = ChunkPort.take_input

    def counted(self: Any) -> Any:
        nonlocal most
        received = right(self)
        if received is not None:
            held.append(weakref.ref(received))
            alive = [tensor for tensor in (ref() for ref in held) if tensor is not None]
            hidden = self.config.hidden_size
            most = max(most, sum(t.nbytes - t.nbytes // t.shape[-1] * hidden for t in alive))
        return received

    with built(settings) as (run, world), made_engine(run, world) as engine:
        plans = drawn_plans(run, local_batches(run, world, 0), 0)
        with mock.patch.object(ChunkPort, "take_input", counted):
            sent = run_step(engine, run, world, 0).wire_bytes
        return {"sent": sent, "held": most, "tables": [plan.table for plan in plans]}


def missing_source(settings: dict[str, Any]) -> str:
    """What a chunk says whose K/V did not come."""
    import torch

    from skv_dist.errors import UserError
    from skv_dist.model.chunk import RoutedChunk
    from skv_dist.routing import RoutePlan

    with built(settings) as (run, _):
        second = RoutedChunk(run, range(5, 8))
        tokens = torch.zeros(2, SEQUENCE, dtype=torch.int64)
        hidden = torch.zeros(SEQUENCE, 2, run.model.hidden_size)
        try:
            second(RoutePlan([0, 1, 2, 3, 4, 1, 6, 7]), tokens, hidden=hidden)
        except UserError as error:
            return str(error)
        return ""
