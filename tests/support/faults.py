"""Faults put in on purpose, each of which a parity test must notice. Applied inside a worker, around one job.

`FAULTS`, at the end, says on which layout.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tests.support.layouts import Layout


def _settings(change: Callable[[dict[str, Any]], None]) -> Any:
    """DeepSpeed's configuration with one cure taken out."""
    from skv_dist.parallel.engines import zero

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


def gradients_reduced_as_they_arrive() -> Any:
    from skv_dist.parallel.engines import zero

    return mock.patch.object(zero, "keep_layers_in_order", _nothing)


def gradients_not_summed_over_tensor_ranks() -> Any:
    from skv_dist.parallel import local_model as build

    return mock.patch.object(build, "add_gradient_sums", _nothing)


def split_parameters_not_marked() -> Any:
    from skv_dist.parallel import local_model as build

    def wrong(model: Any, run: Any) -> None:
        for parameter in model.parameters():
            parameter.tensor_model_parallel = True

    return mock.patch.object(build, "mark_split_parameters", wrong)


def route_off_by_one() -> Any:
    from skv_dist.routing.policies import RandomCLA

    right = RandomCLA.table

    def wrong(self: Any, key: Any) -> tuple[int, ...]:
        return tuple(max(0, s - 1) if s < layer else s for layer, s in enumerate(right(self, key)))

    return mock.patch.object(RandomCLA, "table", wrong)


def borrowed_kv_detached() -> Any:
    from skv_dist.model.chunk import RoutedChunk

    right = RoutedChunk.run_layer

    def wrong(self: Any, number: int, hidden: Any, places: Any, borrowed: Any, *rest: Any) -> Any:
        detached = None if borrowed is None else type(borrowed)(borrowed.key.detach(), borrowed.value.detach())
        return right(self, number, hidden, places, detached, *rest)

    return mock.patch.object(RoutedChunk, "run_layer", wrong)


def drawn_again_in_recompute() -> Any:
    """A re-entrant checkpoint runs forward without gradients, then again with them: another route the second time."""
    import torch

    from skv_dist.model.layer import RoutedLayer

    right = RoutedLayer.forward

    def wrong(self: Any, hidden: Any, rotary: Any, mask: Any, borrowed: Any, *rest: Any) -> Any:
        if torch.is_grad_enabled() and borrowed is not None:
            query_key_value = self.self_attention.get_query_key_value_tensors(self.input_layernorm(hidden))
            borrowed = type(borrowed)(query_key_value[1], query_key_value[2])
        return right(self, hidden, rotary, mask, borrowed, *rest)

    return mock.patch.object(RoutedLayer, "forward", wrong)


def gathered_parameters_kept() -> Any:
    """FSDP, stages 1 and 2: behind an update the next batch goes on with the weights from before it."""
    from skv_dist.parallel.engines.fully_sharded import FullySharded

    return mock.patch.object(FullySharded, "reshard", _nothing)


def late_reduction_left_out() -> Any:
    """FSDP, stage 1: an update without the gradients that were summed for it."""
    from skv_dist.parallel.engines.fully_sharded import FullySharded

    return mock.patch.object(FullySharded, "reduce", _nothing)


def passes_without_end() -> Any:
    """FSDP: nothing follows a forward without gradient."""
    from skv_dist.parallel.engines.fully_sharded import FullySharded

    return mock.patch.object(FullySharded, "_end", _nothing)


def sharded_gradients_not_summed_over_tensor_ranks() -> Any:
    """FSDP: what hooks did to the parameters that it replaces is left out."""
    from skv_dist.parallel.engines.fsdp import FsdpEngine

    return mock.patch.object(FsdpEngine, "_sum_over_tensor_ranks", _nothing)


def norm_of_own_rows() -> Any:
    """FSDP: the gradient norm leaves out what other replicas hold."""
    from skv_dist.parallel.engines.fsdp import FsdpEngine

    right = FsdpEngine.__init__

    def wrong(self: Any, *args: Any, **given: Any) -> None:
        right(self, *args, **given)
        self._norm_groups = self._norm_groups[:1]

    return mock.patch.object(FsdpEngine, "__init__", wrong)


def micro_batch_dropped() -> Any:
    from skv_dist.parallel import run_batch as step

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


def sent_tensor_emptied() -> Any:
    """The schedule's own tensor is sent, which it empties once the send has begun.

    Not in `FAULTS`, as a fast send may be done by then: `tests/parallel/wire/test_wire.py` notices it.
    """
    from skv_dist.parallel.wire.communicator import WireCommunicator

    right = WireCommunicator._communicate

    def wrong(self: Any, *, tensor_shape: Any, **rest: Any) -> Any:
        import torch

        with mock.patch.object(torch.Tensor, "detach", lambda tensor: tensor):
            return right(self, tensor_shape=tensor_shape, **rest)

    return mock.patch.object(WireCommunicator, "_communicate", wrong)


def backward_seen_flag_kept() -> Any:
    from skv_dist.parallel.engines.zero import ZeroEngine

    right = ZeroEngine.__init__

    def wrong(self: Any, *args: Any, **given: Any) -> None:
        right(self, *args, **given)
        self.model.on_backward = None

    return mock.patch.object(ZeroEngine, "__init__", wrong)


def sources_swapped_on_the_wire() -> Any:
    from skv_dist.parallel.wire.packing import Packing

    right = Packing.unpack

    def wrong(self: Any, packed: Any, sources: Any) -> Any:
        return right(self, packed, tuple(reversed(sources)))

    return mock.patch.object(Packing, "unpack", wrong)


def received_kv_detached() -> Any:
    from skv_dist.parallel.wire.packing import Packing

    right = Packing.unpack

    def wrong(self: Any, *args: Any) -> Any:
        hidden, live = right(self, *args)
        return hidden, {source: type(kv)(kv.key.detach(), kv.value.detach()) for source, kv in live.items()}

    return mock.patch.object(Packing, "unpack", wrong)


def tied_gradient_left_out() -> Any:
    from skv_dist.parallel.engines.tied import TiedHead

    right = TiedHead.gradient

    def wrong(self: Any) -> None:
        right(self)

    return mock.patch.object(TiedHead, "gradient", wrong)


def tied_weight_not_refreshed() -> Any:
    from skv_dist.parallel.engines.base import Engine

    return mock.patch.object(Engine, "step", lambda self, skip_update=False: self._update(skip_update))


def chunks_without_overlap() -> Any:
    from skv_dist.model import chunk

    right = chunk.transformer_config

    def wrong(run: Any) -> Any:
        config = right(run)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
        return config

    return mock.patch.object(chunk, "transformer_config", wrong)


def teacher_borrows() -> Any:
    from skv_dist.parallel.teacher import Teacher
    from skv_dist.routing import RoutePlan

    right = Teacher.__init__

    def wrong(self: Any, engine: Any, weight: float) -> None:
        right(self, engine, weight)
        self._full = RoutePlan([0, 0, *range(2, self._full.num_layers)])

    return mock.patch.object(Teacher, "__init__", wrong)


def teacher_learns_from_itself() -> Any:
    """The teacher's weights are those that the model begins with."""
    from tests.support import engine

    def same(right: Any, run: Any) -> None:
        original(right, run.model_copy(update={"train": run.train.model_copy(update={"seed": run.train.seed - 1})}))

    original = engine.assign_initial_values
    return mock.patch.object(engine, "assign_initial_values", same)


def teacher_of_the_batch_before() -> Any:
    """What the teacher sends for one micro-batch is read with the next."""
    from skv_dist.parallel.teacher import Teacher

    right, last = Teacher.add_to, []

    def wrong(self: Any, out: Any, lesson: Any) -> Any:
        last.append(lesson)
        return right(self, out, last[max(0, len(last) - 2)])

    return mock.patch.object(Teacher, "add_to", wrong)


def adapters_drawn() -> Any:
    """No fault: the second matrix of an adapter begins with other than zeros, so that the first gets a gradient."""
    from skv_dist.parallel import initial_values

    def some(name: str, model: Any) -> float | None:
        return None if ".lora_B." in name else right(name, model)

    right = initial_values.initial_constant
    return mock.patch.object(initial_values, "initial_constant", some)


@contextlib.contextmanager
def adapters_not_summed() -> Iterator[None]:
    """The matrix whose partner is split gets this rank's part of its gradient only."""
    from skv_dist.parallel import local_model

    with adapters_drawn(), mock.patch.object(local_model, "is_adapter", return_value=False):
        yield


@contextlib.contextmanager
def adapters_unscaled() -> Iterator[None]:
    from skv_dist.config.lora import LoraConfig

    with adapters_drawn(), mock.patch.object(LoraConfig, "scale", property(lambda self: 1.0)):
        yield


def routes_within_two_stages() -> Any:
    """No fault: gives one process the tables that a pipeline of two draws with routing.within_stage."""
    from skv_dist.config.policy import build_policy
    from skv_dist.config.run import RunConfig

    def policy(self: Any) -> Any:
        half = self.model.num_layers // 2
        return build_policy(self.routing, 2 * half, (range(half), range(half, 2 * half)))

    return mock.patch.object(RunConfig, "policy", policy)


@contextlib.contextmanager
def applied(name: str | None) -> Iterator[None]:
    with globals()[name]() if name else contextlib.nullcontext():
        yield


SPLIT = Layout(tensor=2, sequence_parallel=True)
INTERLEAVED = Layout(pipeline=2, virtual_pipeline=2)
FAULTS = [
    (divided_at_every_stage, Layout(replicas=2, zero_stage=1)),
    (divided_at_every_stage, Layout(replicas=2, zero_stage=1, pipeline=2)),
    (gradients_not_summed_over_tensor_ranks, SPLIT),
    (gradients_not_summed_over_tensor_ranks, Layout(replicas=2, zero_stage=1, tensor=2)),  # q/k-norms, without SP
    (split_parameters_not_marked, Layout(tensor=2)),
    (split_parameters_not_marked, Layout(replicas=2, zero_stage=1, tensor=2)),
    (route_off_by_one, Layout()),
    (borrowed_kv_detached, Layout()),
    (borrowed_kv_detached, Layout(recompute="full")),
    (drawn_again_in_recompute, Layout(recompute="full")),
    (micro_batch_dropped, Layout()),
    (plan_of_the_step_before, Layout()),
    (backward_seen_flag_kept, Layout(replicas=2, zero_stage=2, pipeline=2)),
    (chunks_without_overlap, INTERLEAVED),
    (sources_swapped_on_the_wire, Layout(pipeline=2)),
    (received_kv_detached, Layout(pipeline=2, zero_stage=1, recompute="full")),
    (tied_gradient_left_out, Layout(replicas=2, zero_stage=1, pipeline=2, tie_embeddings=True)),
    (tied_weight_not_refreshed, Layout(pipeline=2, tie_embeddings=True)),
    (gradients_reduced_as_they_arrive, Layout(replicas=2, zero_stage=2)),  # compiled
]
FSDP = Layout(replicas=2, engine="fsdp", zero_stage=1)
FSDP_FAULTS = [
    (sharded_gradients_not_summed_over_tensor_ranks, FSDP._replace(tensor=2)),
    (sharded_gradients_not_summed_over_tensor_ranks, FSDP._replace(tensor=2, sequence_parallel=True, zero_stage=3)),
    (norm_of_own_rows, FSDP),
    (borrowed_kv_detached, FSDP._replace(zero_stage=3, recompute="full", tie_embeddings=True)),
    (received_kv_detached, FSDP._replace(pipeline=2, zero_stage=3)),
    (tied_gradient_left_out, FSDP._replace(pipeline=2, tie_embeddings=True)),
    (tied_weight_not_refreshed, FSDP._replace(pipeline=2, tie_embeddings=True)),
]
