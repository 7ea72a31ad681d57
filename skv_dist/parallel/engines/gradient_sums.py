"""The gradient of a global batch, summed over micro-batches in fp32 and averaged over replicas."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

Gradients = Mapping[torch.Tensor, torch.Tensor]  # by parameter


class GradientSums:
    """Takes each gradient as autograd brings it.

    The gradient of a first micro-batch is kept as it came. The fp32 buffer of all sums is there only from the second
    micro-batch, or else from an update that needs it, to the end of the update.

    Args:
        parameters: whose gradients are taken, from the moment of construction.
        group: data-parallel process group.
        bucket_elements: largest number of elements that one all-reduce carries.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], group: dist.ProcessGroup, bucket_elements: int) -> None:
        self._parameters, self._group, self._bucket_elements = parameters, group, bucket_elements
        self._clear()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._accumulate)

    def _clear(self) -> None:
        self._first: dict[torch.Tensor, torch.Tensor] = {}  # gradients that came once and were not added yet
        self._sums: dict[torch.Tensor, torch.Tensor] = {}  # views of `_buffer`
        self._summed: set[torch.Tensor] = set()  # parameters whose sum has begun
        self._buffer = torch.empty(0)

    @torch.no_grad()
    def _accumulate(self, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if parameter in self._summed:
            self._sums[parameter].add_(gradient)
        elif parameter in self._first:
            self._allocate()
            self._sums[parameter].copy_(self._first.pop(parameter)).add_(gradient)
            self._summed.add(parameter)
        else:
            self._first[parameter] = gradient

    def _allocate(self) -> None:
        if not self._sums:
            sizes = [parameter.numel() for parameter in self._parameters]
            self._buffer = torch.empty(sum(sizes), device=self._parameters[0].device)
            views = self._buffer.split(sizes)
            self._sums = {p: view.view_as(p) for p, view in zip(self._parameters, views)}

    def take(self, *, any_dtype: bool) -> Gradients:
        """The whole batch's gradients, reduced; zeros where none came. The next batch begins with nothing.

        Args:
            any_dtype: the caller takes gradients in their own dtype where nothing had to be added; else all are fp32.
        """
        if any_dtype and not self._sums and self._group.size() == 1:
            gradients = {p: self._first[p] if p in self._first else torch.zeros_like(p) for p in self._parameters}
        else:
            self._reduce()
            gradients = self._sums
        self._clear()
        return gradients

    def _reduce(self) -> None:
        self._allocate()
        if self._first:
            torch._foreach_copy_([self._sums[p] for p in self._first], list(self._first.values()))
        for parameter in self._parameters:
            if parameter not in self._first and parameter not in self._summed:
                self._sums[parameter].zero_()
        if self._group.size() > 1:
            for bucket in self._buffer.split(self._bucket_elements):
                dist.all_reduce(bucket, group=self._group)
            self._buffer.div_(self._group.size())
