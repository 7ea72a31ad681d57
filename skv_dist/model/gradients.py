"""Identities that change what autograd hands back."""

from typing import Any

import torch


class _KeepInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *unread: torch.Tensor) -> torch.Tensor:
        ctx.unread = [(t.shape, t.dtype, t.device) for t in unread]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.unread)


def keep_in_graph(x: torch.Tensor, *unread: torch.Tensor) -> torch.Tensor:
    """``x``, and a zero gradient instead of none for tensors that nobody reads.

    A layer whose K/V nobody reads must still hand every parameter a gradient, on every rank: replicas draw different
    routes, and a reduction that some of them enter and others do not would hang or mix up buckets.
    """
    return _KeepInGraph.apply(x, *unread) if unread else x


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.contiguous()


def contiguous_gradient(x: torch.Tensor) -> torch.Tensor:
    """``x``, whose gradient arrives contiguous.

    A compiled layer is compiled for one memory layout of its outputs' gradients; who reads K/V, and so lays out their
    gradient, changes with the route.
    """
    return _ContiguousGradient.apply(x)
