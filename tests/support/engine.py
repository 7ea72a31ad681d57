"""How jobs make an engine and reach into it: whatever tests touch beyond the product's public functions is here."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.support.batches import local_batches
from tests.support.settings import VOCAB_OF_BYTES


@contextlib.contextmanager
def built(settings: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(run, world), with process groups that are left afterwards."""
    from skv_dist.config.run import RunConfig
    from skv_dist.parallel.processes import groups

    run = RunConfig.model_validate(settings)
    if run.model.vocab_size is None:
        run = run.for_vocabulary(VOCAB_OF_BYTES)
    try:
        yield run, groups.start(run.parallel)
    finally:
        groups.leave_model_parallel()


@contextlib.contextmanager
def made_engine(run: Any, world: Any) -> Iterator[Any]:
    from skv_dist.parallel.engines.create import create_engine

    engine = create_engine(run, world.device)
    try:
        yield engine
    finally:
        engine.close()


def frozen_engine(run: Any, world: Any) -> Any:
    from skv_dist.parallel.engines.frozen import FrozenEngine

    return FrozenEngine(run, world.device)


def assign_initial_values(engine: Any, run: Any) -> None:
    from skv_dist.parallel.initial_values import local_initial_values

    engine.assign(local_initial_values(run, engine.model))


def assign_full(engine: Any, run: Any, world: Any, weights: dict[str, np.ndarray]) -> None:
    """Set parameters from full ones under global names."""
    import torch

    from skv_dist.parallel.tensor_split import split_of

    names = dict(engine.model.named()).keys()
    assert names == weights.keys() or (run.parallel.pipeline > 1 and names < weights.keys())

    def part(name: str, local: Any) -> torch.Tensor:
        full = torch.from_numpy(weights[name])
        return split_of(name, run).take(full, world.tensor_rank, tuple(local.shape))

    engine.assign((parameter, part(name, parameter)) for name, parameter in engine.model.named())


def made_teacher(run: Any, world: Any) -> Any:
    """With other weights than the model begins with; None where the run has no teacher."""
    from skv_dist.parallel.engines.create import create_teacher
    from skv_dist.parallel.teacher import Teacher

    if not run.distillation.weight:
        return None
    engine = create_teacher(run, world.device)
    other = run.train.model_copy(update={"seed": run.train.seed + 1})
    assign_initial_values(engine, run.model_copy(update={"train": other}))
    return Teacher(engine, run.distillation.weight)


def run_step(engine: Any, run: Any, world: Any, step: int, plans: list[Any] | None = None, teacher: Any = None) -> Any:
    """Forward and backward of the global batch of ``step``: the outcome of `run_batch`.

    Args:
        plans: instead of those that the run's policy draws.
    """
    from skv_dist.parallel.processes.groups import seed_dropout
    from skv_dist.parallel.run_batch import count_predictions, run_batch

    batches = local_batches(run, world, step)
    if plans is None:
        plans = drawn_plans(run, batches, step)
    seed_dropout(run.train.seed, step, batches[0].index)
    count = count_predictions(batches)
    return run_batch(engine, run, batches, plans, num_predictions=count, train=True, teacher=teacher)


def drawn_plans(run: Any, batches: list[Any], step: int) -> list[Any]:
    from skv_dist.routing.draw import DrawKey

    policy = run.policy()
    return [policy.plan(DrawKey(run.train.seed, step, batch.index)) for batch in batches]


def full_weights(engine: Any, run: Any) -> dict[str, np.ndarray]:
    from tests.support.gather import full_parameters

    named = full_parameters(engine, run)
    return {name: value.numpy().copy() for name, value in named}


def switch_backward_hook_off(engine: Any) -> None:
    """No one tells DeepSpeed any more that a backward begins."""
    engine.model.on_backward = None


def capture_gradients(engine: Any, run: Any) -> tuple[float, dict[str, np.ndarray]]:
    """Gradient norm and every gradient of the last batch, reduced, as the optimizer would get it.

    The update is replaced by "weight := gradient": whatever the ZeRO stage, full weights then are full gradients.
    """

    def take_gradient(weight: Any, gradient: Any) -> None:
        weight.copy_(gradient)

    engine.replace_update(take_gradient)
    outcome = engine.step()
    return float(outcome.grad_norm), full_weights(engine, run)
