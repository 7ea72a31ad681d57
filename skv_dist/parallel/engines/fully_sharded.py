"""A model whose parameters lie in pieces on the data-parallel ranks, through torch's ``fully_shard`` (FSDP2).

`FullySharded` uses its public functions alone. What they do silently, and how that is met, is told where it matters
(and in docs/pitfalls.md).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from megatron.core import parallel_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode

from skv_dist.config.run import RunConfig
from skv_dist.model.megatron_config import DTYPES
from skv_dist.parallel.local_model import (
    build_local_model,
    mark_split_parameters,
    partial_gradients,
)


class _NoDevice(TorchFunctionMode):
    """Megatron names the device of each parameter that it makes on a GPU; it is made without memory all the same."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {} if kwargs is None or kwargs.get("device") is None else {"device": "meta"}
        return function(*args, **{**(kwargs or {}), **named})


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    with torch.device("meta"), _NoDevice():
        yield


def local_rows(parameter: torch.Tensor) -> torch.Tensor:
    """The rows of a sharded tensor that this rank holds, in its own memory."""
    return cast(DTensor, parameter).to_local().detach()


class FullySharded:
    """The chunks of this rank, each layer sharded over the replicas by rows, embedding, last norm and head together.

    Outside of a step each parameter is a DTensor of the shape of this tensor-parallel rank's part: fp32 where it
    learns, in the run's precision where it is frozen. It is gathered in the run's precision, under another name for
    Python: whoever asks the model for its parameters must find them sharded.

    What is whole at which time is ZeRO's:

    - stages 1 and 2: parameters from their first forward until `reshard`,
    - stage 3: those of a layer within its forward and its backward; embedding and head within a pass,
    - stage 1: also gradients, summed in fp32 over micro-batches until `reduce`.

    Attributes:
        model: not to be called but through `call`.
        partial: see `partial_gradients`. ``fully_shard`` puts new parameters in the place of the old, without the hooks
            of those: their owner sums these once a step.
    """

    def __init__(self, run: RunConfig, device: torch.device, *, learns: bool) -> None:
        """Build the model; weights are not yet set.

        Args:
            learns: whether parameters that are not frozen by the configuration get gradients.
        """
        model = self.model = build_local_model(run, device, _without_memory())
        if not learns:
            model.requires_grad_(False)
        for _, parameter in model.trainable():
            parameter.data = parameter.data.float()
        self.partial = partial_gradients(model, run)
        self._by_layer = run.parallel.zero_stage == 3
        self._mesh = DeviceMesh.from_group(parallel_state.get_data_parallel_group(), device.type)
        dtype = DTYPES[run.train.precision]
        # Left to itself it would round every tensor that goes in, such as a gradient in fp32.
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        layers = [layer for chunk in model.routed_chunks() for layer in chunk.routed_layers()]
        for module in layers:
            fully_shard(module, mesh=self._mesh, reshard_after_forward=self._by_layer, mp_policy=precision)
        self._root = fully_shard(model, mesh=self._mesh, reshard_after_forward=False, mp_policy=precision)
        self._sharded: list[FSDPModule] = [*layers, self._root]
        self._root.set_reshard_after_backward(self._by_layer)
        self._root.set_requires_gradient_sync(run.parallel.zero_stage > 1)
        model.to_empty(device=device)
        mark_split_parameters(model, run)

    def call(self, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        """A method of the model; without gradient, parameters are sharded again behind it."""
        out: torch.Tensor = self.model(function, *args)
        if not torch.is_grad_enabled():
            self._end()
        return out

    def reduce(self) -> None:
        """Reduce the gradients that were summed since the last time (stage 1)."""
        self._root.set_requires_gradient_sync(True)
        self._empty_backward()
        self._root.set_requires_gradient_sync(False)

    def reshard(self) -> None:
        """Give up what is gathered, which an update has outdated. Stages 1 and 2 would go on with it silently."""
        for module in self._sharded:
            module.reshard()

    def _end(self) -> None:
        self._empty_backward()
        self.reshard()

    def _empty_backward(self) -> None:
        """The end of a backward, at which FSDP reduces what it has not reduced yet, and forgets in which order it
        gathered: without one, forwards would fill the memory with that."""
        with torch.enable_grad():
            self.model(lambda: torch.zeros((), device=self.model.device, requires_grad=True)).backward()

    def begin(self, parameter: torch.Tensor) -> int:
        """Place of the first element of `local_rows` in the parameter laid end to end."""
        rows = -(-parameter.shape[0] // self._mesh.size())
        first = min(rows * self._mesh.get_local_rank(), parameter.shape[0])
        return first * parameter.shape[1:].numel()

    def whole(self, parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """From the rows of each replica, of the shape of `local_rows`, all of them. Collective over replicas."""
        rows = DTensor.from_local(
            local, self._mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        return rows.full_tensor()

    def set_rows(self, parameter: torch.Tensor, local: torch.Tensor, value: torch.Tensor) -> None:
        """Copy this rank's rows of a value of the whole parameter's shape to where they lie."""
        begin = self.begin(parameter)
        local.copy_(value.flatten()[begin : begin + local.numel()].view_as(local))
