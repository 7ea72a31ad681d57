"""Megatron's pipeline transport for tensors whose width changes with the route."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator


class WireCommunicator(P2PCommunicator):
    """Receives tensors of the width that the route plans say, instead of one fixed width; counts what it sends.

    Args:
        pp_group: pipeline group.
        config: Megatron's configuration of the layers.
        incoming: width of each tensor that will come from the stage before, in order.
        outgoing: width of each tensor that will go to the stage behind, in order: gradients come back in that width.
    """

    def __init__(self, pp_group: Any, config: Any, incoming: Sequence[int], outgoing: Sequence[int]) -> None:
        super().__init__(pp_group, config)
        self._incoming: Iterator[int] = iter(incoming)
        self._outgoing: Iterator[int] = iter(outgoing)
        self.sent_bytes = 0

    def _communicate(self, *, tensor_shape: Any, **rest: Any) -> Any:
        widths = set()
        if rest["recv_prev"]:
            widths.add(next(self._incoming))
        if rest["recv_next"]:
            widths.add(next(self._outgoing))
        for name in ("tensor_send_next", "tensor_send_prev"):
            tensor: torch.Tensor | None = rest[name]
            if tensor is not None:
                self.sent_bytes += tensor.nbytes
                # The schedule empties a tensor once its send has begun (`deallocate_pipeline_outputs`). Where sends
                # overlap with computation, gloo would then send freed memory; an alias keeps the storage until done.
                rest[name] = tensor.detach()
        if widths:
            # Both directions at once happens in the interleaved schedule only, where all widths of a step are one.
            (width,) = widths
            tensor_shape = (*tensor_shape[:2], width)
        return super()._communicate(tensor_shape=tensor_shape, **rest)
