"""The compiled update against torch's own, gradients in bf16."""

import shutil
from typing import Any

import pytest
import torch

from skv_dist.parallel.engines.compiled_adamw import CompiledAdamW
from skv_dist.parallel.engines.optimizer import GuardedAdamW

SHAPES = {
    "embedding.weight": (50, 8),
    "layers.0.mlp.weight": (8, 16),
    "layers.0.norm.weight": (8,),
    "layers.1.mlp.weight": (8, 16),
    "layers.1.norm.weight": (8,),
}


def make() -> tuple[list[Any], GuardedAdamW]:
    """(name, master, working copy) of each parameter, and the optimizer over the masters."""
    torch.manual_seed(0)
    weights = {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}
    named = [(name, torch.nn.Parameter(w.float()), torch.nn.Parameter(w)) for name, w in weights.items()]
    groups = [
        {"params": [master for name, master, _ in named if ("norm" in name) == plain], "weight_decay": decay}
        for plain, decay in ((False, 0.1), (True, 0.0))
    ]
    optimizer = GuardedAdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for _, master, _ in named:
        optimizer.state[master] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }
    return named, optimizer


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_equals_fused_adamw_step_by_step() -> None:
    expected, fused = make()
    found, optimizer = make()
    compiled = CompiledAdamW(optimizer, found)
    for step in range(4):
        for group in (*fused.param_groups, *optimizer.param_groups):
            group["lr"] = 1e-2 / (1 + step)
        scale, applied = torch.tensor(1.0 + step), torch.tensor(step != 2)
        gradients = [torch.randn_like(copy) for _, _, copy in found]
        before = [master.detach().clone() for _, master, _ in found]
        for (_, master, _), gradient in zip(expected, gradients):
            master.grad = gradient.float()
        fused.grad_scale, fused.found_inf = scale, (~applied).float()
        fused.step()
        compiled.step({copy: g for (_, _, copy), g in zip(found, gradients)}, scale, applied)
        for (_, reference, _), (_, master, copy), old in zip(expected, found, before):
            torch.testing.assert_close(master, reference, rtol=1e-6, atol=1e-6)
            assert torch.equal(copy, master.bfloat16())
            assert torch.equal(master, old) is not bool(applied)
            for key, value in fused.state[reference].items():
                torch.testing.assert_close(optimizer.state[master][key], value, rtol=1e-6, atol=1e-7)
