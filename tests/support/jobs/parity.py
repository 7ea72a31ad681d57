"""Training a little, with all that comes out of it: what layouts are compared by."""

from typing import Any

import numpy as np

from tests.support import engine as engines
from tests.support.engine import built, made_engine, made_teacher, run_step
from tests.support.settings import BASE

STEPS = 2  # the second finds Adam's moments as the first has left them


def train(
    settings: dict[str, Any], steps: int = STEPS, fault: str | None = None, without_clipping: bool = True
) -> dict[str, Any] | None:
    """Take the gradients of one batch, then, from the start again, train some steps on others.

    Rank 0 returns losses, gradient norms, gradients and the parameters at the end.

    Args:
        fault: name of a function in `tests.support.faults`.
        without_clipping: switch clipping off for the first batch, where it would hide a wrong scale of the gradient.
    """
    import torch

    from tests.support import faults

    # What an earlier job compiled, or gave up compiling, must not decide what this one runs.
    torch._dynamo.reset()
    with faults.applied(fault), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        return _train(settings, steps, without_clipping)


def _train(settings: dict[str, Any], steps: int, without_clipping: bool) -> dict[str, Any] | None:
    losses, norms = [], []

    def record(outcome: Any) -> None:
        losses.append(outcome.loss.item())
        if outcome.divergence is not None:
            losses.append(outcome.divergence.item())

    with built(settings) as (run, world):
        teacher = made_teacher(run, world)
        with made_engine(run, world) as engine:
            record(run_step(engine, run, world, steps, teacher=teacher))
            if without_clipping:
                engine.set_clip_grad_norm(0.0)
            norm, gradients = engines.capture_gradients(engine, run)
            norms.append(norm)
        with made_engine(run, world) as engine:
            engine.set_lr(run.optimizer.lr)
            for step in range(steps):
                record(run_step(engine, run, world, step, teacher=teacher))
                norms.append(float(engine.step().grad_norm))
            parameters = engines.full_weights(engine, run)
        result = {"losses": losses, "norms": norms, "parameters": parameters, "gradients": gradients}
        return result if world.is_first else None


def logits(
    settings: dict[str, Any], weights: dict[str, np.ndarray] | None, tokens: np.ndarray, table: list[int]
) -> Any:
    """Logits [b, s, v] under a route table, of given weights (global names) or the initial ones."""
    import torch

    from skv_dist.routing import RoutePlan

    with built(settings) as (run, world):
        engine = engines.frozen_engine(run, world)
        if weights is None:
            engines.assign_initial_values(engine, run)
        else:
            engines.assign_full(engine, run, world, weights)
        with torch.no_grad():
            out = engine.forward(0, RoutePlan(table), torch.from_numpy(tokens))
        return out.numpy().copy() if world.is_first else None


def skip_update(settings: dict[str, Any]) -> tuple[list[bool], float]:
    """(checks, gradient norm of the next step): a skipped update changes no parameter and leaves no gradient."""
    from skv_dist.routing import RoutePlan

    with built(settings) as (run, world), made_engine(run, world) as engine:

        def backward(step: int) -> None:
            num_batches = run.train.global_batch_size // run.train.micro_batch_size // world.data_size
            run_step(engine, run, world, step, [RoutePlan(range(run.model.num_layers))] * num_batches)

        before = engines.full_weights(engine, run)
        backward(0)
        outcome = engine.step(skip_update=True)
        after = engines.full_weights(engine, run)
        unchanged = all(np.array_equal(before[name], after[name]) for name in before)
        backward(1)
        clean = engine.step()
        moved = engines.full_weights(engine, run)
        changed = any(not np.array_equal(before[name], moved[name]) for name in before)
        return [unchanged, not outcome.applied, bool(clean.applied), changed], float(clean.grad_norm)


def two_backwards(settings: dict[str, Any], with_hook: bool) -> list[float]:
    """Gradient norm of two micro-batches: both forwards before both backwards, then one after the other."""
    from skv_dist.routing import RoutePlan
    from tests.support.batches import global_batch

    first, second = global_batch(0)[:2]

    def loss(engine: Any, batch: Any) -> Any:
        plan = RoutePlan(range(BASE["model"]["num_layers"]))
        return (engine.forward(0, plan, batch.tokens, batch.labels) * batch.loss_mask).sum()

    norms = []
    with built(settings) as (run, world):
        for together in (True, False):
            with made_engine(run, world) as engine:
                if not with_hook:
                    engines.switch_backward_hook_off(engine)
                if together:
                    losses = [loss(engine, first), loss(engine, second)]
                    for value in losses:
                        value.backward()
                else:
                    loss(engine, first).backward()
                    loss(engine, second).backward()
                norms.append(float(engine.step().grad_norm))
    return norms
