"""Retention sweep: the loss under each deployment map, on the same samples."""

from collections.abc import Callable, Mapping, Sequence

from skv_dist.config.run import RunConfig
from skv_dist.data.batches import MicroBatch, Samples, micro_batch_numbers, micro_batches
from skv_dist.data.stream import HeldOutStream
from skv_dist.errors import UserError
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.processes.groups import World
from skv_dist.parallel.run_batch import (
    count_predictions,
    counts_by_source,
    means_by_source,
    run_batch,
    sums_by_source,
)
from skv_dist.parallel.shared_reading import SharedReading
from skv_dist.routing import RoutePlan


def retention_plans(run: RunConfig) -> dict[str, RoutePlan]:
    """``loss@0.50`` and so on for each value of ``eval.retention``, with the map that retention stands for."""
    return {f"loss@{retention:.2f}": RoutePlan(run.sharing_map(retention)) for retention in run.eval.retention}


def evaluation_batches(run: RunConfig, world: World, samples: Samples, first: int = 0) -> list[MicroBatch]:
    """This replica's part of the ``eval.samples`` samples from ``first`` on.

    Micro-batches are filled up with samples that do not count, so that the result does not depend on the layout. Of a
    stream one rank of each replica reads: collective then.

    Raises:
        UserError: they cannot be read.
    """
    size, replicas = run.train.micro_batch_size, world.data_size
    rounds = -(-run.eval.samples // (size * replicas))
    if run.parallel.virtual_pipeline > 1:  # the interleaved schedule takes a multiple of its stages
        rounds = -(-rounds // run.parallel.pipeline) * run.parallel.pipeline

    def read() -> list[MicroBatch]:
        return micro_batches(samples, first, rounds, size, world.data_rank, replicas, run.data.reset_attention)

    batches = _shared(read, run, world, rounds) if isinstance(samples, HeldOutStream) else read()
    for batch in batches:
        batch.loss_mask[max(0, run.eval.samples - batch.index * size) :] = 0
    return [batch.to(world.device) for batch in batches]


def check_measured(best: str | None, run: RunConfig, batches: list[MicroBatch], sources: Sequence[str]) -> None:
    """Whether there is anything to measure the loss of the source on that ``eval.best`` names, if it does. Collective.

    Raises:
        UserError: there is not, so that no checkpoint would be the best.
    """
    if best is None or "/" not in best:
        return
    counts = counts_by_source(batches, len(sources)).tolist() if len(sources) > 1 else []
    seen = [source for source, count in zip(sources, counts) if count]
    if best.partition("/")[2] not in seen:
        raise UserError(
            f"eval.best '{best}' has nothing to be measured on, as the first {run.eval.samples} validation sequences "
            f"(eval.samples) are of {', '.join(seen) or 'one source'} alone: raise eval.samples, hold out more of that "
            "source, or name another evaluation"
        )


def _shared(read: Callable[[], list[MicroBatch]], run: RunConfig, world: World, rounds: int) -> list[MicroBatch]:
    numbers = micro_batch_numbers(rounds, world.data_rank, world.data_size)
    size = (run.train.micro_batch_size, run.data.sequence_length)
    shared = SharedReading()
    try:
        return shared.share(read, numbers, size, documents=run.data.reset_attention)
    finally:
        shared.close()


def sweep(
    engine: Engine,
    run: RunConfig,
    batches: list[MicroBatch],
    plans: Mapping[str, RoutePlan],
    sources: Sequence[str] = (),
) -> dict[str, float]:
    """Mean loss in nats per token under each plan, the same on all ranks. Collective.

    Args:
        sources: names of the data sources. Where there are several, ``PLAN/SOURCE`` is the loss of the samples of each.
    """
    num_predictions = count_predictions(batches)
    losses = {}
    for name, plan in plans.items():
        same_plan = [plan] * len(batches)
        outcome = run_batch(engine, run, batches, same_plan, num_predictions=num_predictions, train=False)
        losses[name] = outcome.loss.item()
        if len(sources) > 1:
            means = means_by_source(sums_by_source(outcome.sums, batches, len(sources)), sources)
            losses.update({f"{name}/{source}": loss for source, loss in means.items()})
    return losses
