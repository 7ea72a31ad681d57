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


def sent_once_emptied(settings: dict[str, Any], fault: str | None) -> list[float]:
    """What is left of a tensor to be sent once the schedule has emptied its own, as it does while sends are under way.

    On the way the tensor is only handed to Megatron's transport, so that no speed of a transfer decides.
    """
    from unittest import mock

    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor

    from skv_dist.model.megatron_config import transformer_config
    from skv_dist.parallel.wire.communicator import WireCommunicator
    from tests.support import faults

    handed_on: list[torch.Tensor] = []
    nothing = {"tensor_send_prev": None, "recv_prev": False, "recv_next": False}
    with built(settings) as (run, _), faults.applied(fault):
        group = parallel_state.get_pipeline_model_parallel_group()
        communicator = WireCommunicator(group, transformer_config(run), [], [])
        tensor = torch.ones(3, 2, 1)
        with mock.patch.object(
            P2PCommunicator, "_communicate", lambda self, **rest: handed_on.append(rest["tensor_send_next"])
        ):
            communicator._communicate(tensor_shape=(3, 2, 1), tensor_send_next=tensor, **nothing)
        deallocate_output_tensor(tensor, True)
    return [float(value) for value in handed_on[0].flatten()]
