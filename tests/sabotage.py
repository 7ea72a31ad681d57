"""Faults put in on purpose, each of which a parity test must notice. Applied inside a worker, around one job."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock


def _settings(change: Callable[[dict[str, Any]], None]) -> Any:
    """DeepSpeed's configuration with one cure taken out."""
    from skv_dist.parallel import zero

    right = zero.deepspeed_config

    def wrong(run: Any) -> dict[str, Any]:
        config = right(run)
        change(config)
        return config

    return mock.patch.object(zero, "deepspeed_config", wrong)


def _nothing(*_: Any) -> None:
    return None


def divided_at_every_stage() -> Any:
    return _settings(lambda c: c.update(gradient_accumulation_steps=2, managed_gradient_accumulation=True))


def clipped_by_default() -> Any:
    return _settings(lambda c: c.pop("gradient_clipping"))


def gradients_not_summed_over_tensor_ranks() -> Any:
    from skv_dist.parallel import build

    return mock.patch.object(build, "add_gradient_sums", _nothing)


def split_parameters_not_marked() -> Any:
    from skv_dist.parallel import build

    def wrong(root: Any, run: Any) -> None:
        for parameter in root.parameters():
            parameter.tensor_model_parallel = True

    return mock.patch.object(build, "mark_parameters", wrong)


def route_off_by_one() -> Any:
    from skv_dist.routing.policies import RandomCLA

    right = RandomCLA.table

    def wrong(self: Any, key: Any) -> tuple[int, ...]:
        return tuple(max(0, s - 1) if s < layer else s for layer, s in enumerate(right(self, key)))

    return mock.patch.object(RandomCLA, "table", wrong)


def borrowed_kv_detached() -> Any:
    from skv_dist.model.chunk import RoutedChunk

    right = RoutedChunk._run_layer

    def wrong(self: Any, number: int, hidden: Any, rotary: Any, mask: Any, borrowed: Any, keep: bool) -> Any:
        detached = None if borrowed is None else type(borrowed)(borrowed.key.detach(), borrowed.value.detach())
        return right(self, number, hidden, rotary, mask, detached, keep)

    return mock.patch.object(RoutedChunk, "_run_layer", wrong)


def drawn_again_in_recompute() -> Any:
    """A re-entrant checkpoint runs forward without gradients, then again with them: another route the second time."""
    import torch

    from skv_dist.model.layer import RoutedLayer

    right = RoutedLayer.forward

    def wrong(self: Any, hidden: Any, rotary: Any, mask: Any, borrowed: Any, read: bool) -> Any:
        if torch.is_grad_enabled() and borrowed is not None:
            query_key_value = self.self_attention.get_query_key_value_tensors(self.input_layernorm(hidden))
            borrowed = type(borrowed)(query_key_value[1], query_key_value[2])
        return right(self, hidden, rotary, mask, borrowed, read)

    return mock.patch.object(RoutedLayer, "forward", wrong)


def micro_batch_dropped() -> Any:
    from skv_dist.parallel import step

    right = step.run_batch

    def wrong(engine: Any, run: Any, batches: Any, plans: Any, **rest: Any) -> Any:
        return right(engine, run, batches[:-1], plans[:-1], **rest)

    return mock.patch.object(step, "run_batch", wrong)


def plan_of_the_step_before() -> Any:
    from skv_dist.routing.policies import Policy

    def wrong(self: Any, key: Any) -> Any:
        from skv_dist.routing import RoutePlan

        return RoutePlan(self.table(type(key)(key.seed, key.step - 1, key.micro_batch)))

    return mock.patch.object(Policy, "plan", wrong)


@contextlib.contextmanager
def applied(name: str | None) -> Iterator[None]:
    with globals()[name]() if name else contextlib.nullcontext():
        yield
