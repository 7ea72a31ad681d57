"""Adapters beside the same model without them."""

from typing import Any

import numpy as np

from tests.support import engine as engines
from tests.support.engine import built, made_engine, run_step


def gradients(settings: dict[str, Any], weights: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Loss, weights and every gradient of one batch, in one process; with adapters, both of whose matrices are drawn.

    Args:
        weights: in place of the initial ones.
    """
    from tests.support import faults

    with faults.applied("adapters_drawn"), built(settings) as (run, world), made_engine(run, world) as engine:
        if weights is not None:
            engines.assign_full(engine, run, world, weights)
        before = engines.full_weights(engine, run)
        loss = run_step(engine, run, world, 0).loss.item()
        engine.prepare_moments()
        engine.set_clip_grad_norm(0.0)
        _, found = engines.capture_gradients(engine, run)
        return {"loss": loss, "weights": before, "gradients": found, "states": len(engine.optimizer.state)}


def kinds_of_layers(settings: dict[str, Any]) -> int:
    """How many layers differ in the classes of their modules."""
    with built(settings) as (run, world), made_engine(run, world) as engine:
        layers = [layer for chunk in engine.model.chunks for layer in chunk.routed_layers()]
        return len({tuple(type(module) for module in layer.modules()) for layer in layers})
