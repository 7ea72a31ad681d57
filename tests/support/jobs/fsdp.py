"""What is whole at which time under `FsdpEngine`."""

from typing import Any

from tests.support.engine import built, drawn_plans, made_engine, run_step


def losses(settings: dict[str, Any], steps: int, fault: str | None = None) -> list[float]:
    """Of training steps."""
    from tests.support import faults

    with faults.applied(fault), built(settings) as (run, world), made_engine(run, world) as engine:
        engine.set_lr(run.optimizer.lr)
        found = []
        for step in range(steps):
            found.append(run_step(engine, run, world, step).loss.item())
            engine.step()
        return found


def repeated(settings: dict[str, Any], times: int) -> dict[str, Any]:
    """Every gradient of one batch, run forward and backward so many times before the update."""
    from tests.support import engine as engines

    with built(settings) as (run, world), made_engine(run, world) as engine:
        for _ in range(times):
            run_step(engine, run, world, 0)
        engine.set_clip_grad_norm(0.0)
        return engines.capture_gradients(engine, run)[1]


def states(settings: dict[str, Any], fault: str | None = None) -> dict[str, list[tuple[bool, bool]]]:
    """Whether a layer's weight is whole, and whether its rows have a gradient: at some times, and after passes without
    gradient also what FSDP remembers of them.
    """
    import torch
    from torch.distributed.tensor import DTensor

    from tests.support import faults
    from tests.support.batches import local_batches

    with faults.applied(fault), built(settings) as (run, world), made_engine(run, world) as engine:
        rows = dict(engine.model.named())["layers.1.mlp.linear_fc1.weight"]
        module = engine.model.routed_chunks()[0].layers["1"].mlp.linear_fc1

        def now() -> tuple[bool, bool]:
            return not isinstance(module.weight, DTensor), rows.grad is not None

        (batch, *_), found = local_batches(run, world, 0), {}
        (plan, *_) = drawn_plans(run, [batch], 0)
        found["made"] = now()
        out = engine.forward(0, plan, batch.tokens, batch.labels)
        found["forward"] = now()
        out.sum().backward()
        found["backward"] = now()
        engine.step()
        found["step"] = now()
        with torch.no_grad():
            for _ in range(3):
                engine.forward(0, plan, batch.tokens, batch.labels)
        found["evaluated"] = now()
        remembered = len(engine.model._get_fsdp_state()._comm_ctx.post_forward_order)
        return {**found, "remembered": remembered}


def made_without_memory() -> bool:
    """Whether what names its device is made without memory."""
    import torch

    from skv_dist.parallel.engines.fully_sharded import _without_memory

    with _without_memory():
        made = [torch.empty(2), torch.empty(2, device="cpu"), torch.nn.Linear(2, 2, device=torch.device("cpu")).weight]
    return all(value.is_meta for value in made) and not torch.empty(2).is_meta
