"""SwiGLU for compiled layers."""

from typing import Any

import torch
import torch.nn.functional as F


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up, as autograd would have it but for the shape of the backward kernel.

    Autograd's would be the concatenation of two gradients, for which Inductor evaluates both, exponentials and all, at
    every element. Here one expression holds for either half.
    """

    @staticmethod
    def forward(ctx: Any, joint: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(joint)
        gate, up = joint.unflatten(-1, (2, -1)).unbind(-2)  # [..., 2 * f] -> twice [..., f]
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (joint,) = ctx.saved_tensors
        gate, up = joint.unflatten(-1, (2, -1)).float()[..., None, :].unbind(-3)  # [..., 1, f]
        sigmoid = gate.sigmoid()
        is_gate = torch.arange(2, device=joint.device)[:, None] == 0
        slope = torch.where(is_gate, up * (1 + gate * (1 - sigmoid)), gate)  # [..., 2, f]
        return (grad.float()[..., None, :] * sigmoid * slope).flatten(-2).to(joint.dtype)  # [..., 2 * f]


def swiglu(joint: torch.Tensor) -> torch.Tensor:
    """SwiGLU (Shazeer, arXiv 2002.05202) of gate and up side by side: [..., 2 * f] -> [..., f]."""
    return _SwiGlu.apply(joint)
