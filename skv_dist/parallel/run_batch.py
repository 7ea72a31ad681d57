"""One batch forward and backward through Megatron's schedule."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from skv_dist.config.run import RunConfig
from skv_dist.data.batches import MicroBatch
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.teacher import Teacher
from skv_dist.parallel.wire.communicator import WireCommunicator
from skv_dist.parallel.wire.port import ChunkPort
from skv_dist.parallel.wire.widths import WireWidths, wire_widths
from skv_dist.routing import RoutePlan

Work = tuple[MicroBatch, RoutePlan]


@dataclass(frozen=True)
class BatchOutcome:
    """What one batch gave.

    Attributes:
        loss: float32 scalar, mean over the global batch in nats per prediction, the same on all ranks.
        divergence: likewise, KL(teacher || model); None without a teacher.
        sums: on the last pipeline stage the summed loss of each sequence, [b] for each micro-batch of this replica
            (with a teacher [2, b]); elsewhere empty.
        wire_bytes: what this rank sent to other pipeline stages.
    """

    loss: torch.Tensor
    divergence: torch.Tensor | None
    sums: list[torch.Tensor]
    wire_bytes: int


def count_predictions(batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Number of predictions that count, over all micro-batches of all replicas: float64 scalar on their device."""
    count = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()
    group = parallel_state.get_data_parallel_group()
    if group.size() > 1:
        dist.all_reduce(count, group=group)
    return count


def run_batch(
    engine: Engine,
    run: RunConfig,
    batches: Sequence[MicroBatch],
    plans: Sequence[RoutePlan],
    *,
    num_predictions: torch.Tensor,
    train: bool,
    teacher: Teacher | None = None,
) -> BatchOutcome:
    """Run the micro-batches of one global batch that fall to this replica.

    The loss of the batch is the mean over all its counted predictions, so it does not depend on how the batch is cut.

    Args:
        batches: this replica's micro-batches, on the device.
        plans: the route plan of each.
        num_predictions: predictions that count in the whole global batch (`count_predictions`).
        train: also run backward, leaving gradients in the engine.
        teacher: makes part of what is minimized. The same on all ranks.
    """
    num_predictions = num_predictions.clamp(min=1.0)
    work = list(zip(batches, plans, strict=True))
    widths = wire_widths(run, plans, 0 if teacher is None else teacher.columns)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    ports = _ports(engine)
    communicator = WireCommunicator(
        parallel_state.get_pipeline_model_parallel_group(),
        ports[0].config,
        incoming=widths.behind(stage - 1),
        outgoing=widths.behind(stage),
    )
    if engine.model.training != train:  # train() walks through all modules
        engine.model.train(train)
    with torch.set_grad_enabled(train):
        scale = _loss_scale(num_predictions)
        sums = _run_schedule(engine, teacher, ports, work, widths, communicator, scale, train)
    if train:
        engine.add_tied_gradient()
    means = (_over_all_ranks(sums, teacher is not None, batches[0].tokens.device) / num_predictions).float()
    loss, divergence = (means, None) if teacher is None else means
    return BatchOutcome(loss, divergence, sums, communicator.sent_bytes)


def sums_by_source(sums: Sequence[torch.Tensor], batches: Sequence[MicroBatch], num_sources: int) -> torch.Tensor:
    """What the loss of a global batch is made of: float64 [2, num_sources], the same on all ranks. Collective.

    Args:
        sums: `BatchOutcome.sums` of ``batches``.

    Returns:
        For each data source the summed loss of its predictions, and their number.
    """
    counts = _counts(batches)
    losses = torch.zeros_like(counts)
    if _is_last_stage():
        of_all = torch.cat(list(sums), dim=-1).double()  # [n], with a teacher [2, n]
        losses = of_all if of_all.dim() == 1 else of_all[0]
    return _by_source(torch.stack([losses, counts]), batches, num_sources)


def counts_by_source(batches: Sequence[MicroBatch], num_sources: int) -> torch.Tensor:
    """Of each data source how many predictions count over all replicas, float64 [num_sources]. Collective."""
    return _by_source(_counts(batches)[None], batches, num_sources)[0]


def _counts(batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Predictions of each sequence that count, float64 [n]."""
    return torch.cat([batch.loss_mask.sum(dim=-1, dtype=torch.float64) for batch in batches])


def _by_source(values: torch.Tensor, batches: Sequence[MicroBatch], num_sources: int) -> torch.Tensor:
    """[k, n] of the sequences of this replica -> [k, num_sources], summed over all of them. Collective."""
    sources = torch.cat([batch.sources for batch in batches])  # [n]
    is_of = sources == torch.arange(num_sources, device=sources.device)[:, None]  # [num_sources, n]
    # Not by a product: what is not finite in one source would be in all.
    return _summed_from_last_stage(torch.where(is_of, values[:, None], 0.0).sum(-1))


def means_by_source(sums: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Mean loss of each source of `sums_by_source`, in nats per prediction; of those alone that have any."""
    losses, counts = sums.tolist()
    return {name: loss / count for name, loss, count in zip(names, losses, counts) if count}


def _ports(engine: Engine) -> list[ChunkPort]:
    chunks = engine.model.routed_chunks()
    return [ChunkPort(chunk, index, len(chunks)) for index, chunk in enumerate(chunks)]


def _loss_scale(num_predictions: torch.Tensor) -> torch.Tensor:
    """What a sum of losses is multiplied by before its backward: engines average gradients over replicas afterwards."""
    return (parallel_state.get_data_parallel_world_size() / num_predictions).float()


def _run_schedule(
    engine: Engine,
    teacher: Teacher | None,
    ports: list[ChunkPort],
    work: Sequence[Work],
    widths: WireWidths,
    communicator: WireCommunicator,
    loss_scale: torch.Tensor,
    train: bool,
) -> list[torch.Tensor]:
    """Run Megatron's schedule; returns `BatchOutcome.sums`."""

    def forward_step(waiting: Iterator[Work], port: ChunkPort) -> tuple[torch.Tensor, object]:
        batch, plan = next(waiting)
        received, lesson = port.take_input(), None
        if teacher is not None:
            lesson = teacher.run_chunk(port.index, batch, received)
            received = lesson.received
        logits = lesson.given if lesson is not None and port.is_last else None
        out = engine.forward(
            port.index, plan, batch.tokens, batch.labels, batch.documents, received, widths.padded, None, logits
        )
        if teacher is not None and lesson is not None and not port.is_last:
            out = teacher.add_to(out, lesson)

        def loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """losses [..., b, s] -> what backward begins from, a count of tokens, and what the schedule returns."""
            by_sequence = (losses * batch.loss_mask).sum(dim=-1)
            summed = by_sequence.sum(dim=-1)
            objective = summed if teacher is None else teacher.objective(summed)
            # Megatron would count tokens and divide by them; the division is already in our scale.
            return objective * loss_scale, torch.zeros([], dtype=torch.int, device=summed.device), by_sequence.detach()

        return out, loss

    interleaved = len(ports) > 1
    tokens = work[0][0].tokens  # [b, s]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(work) for _ in ports] if interleaved else iter(work),
        model=ports if interleaved else ports[0],
        num_microbatches=len(work),
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        forward_only=not train,
        p2p_communicator=communicator,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def _over_all_ranks(sums: Sequence[torch.Tensor], taught: bool, device: torch.device) -> torch.Tensor:
    """The sum of the losses of the global batch, on all ranks. The last stage knows those of its replica."""
    shape = [2] if taught else []
    loss_sum = torch.cat(list(sums), dim=-1).sum(-1) if _is_last_stage() else torch.zeros(shape, device=device)
    return _summed_from_last_stage(loss_sum)


def _is_last_stage() -> bool:
    group = parallel_state.get_pipeline_model_parallel_group()
    return parallel_state.get_pipeline_model_parallel_rank() == group.size() - 1


def _summed_from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """Over all replicas the sum of what their last stages have, on all ranks. In place."""
    group = parallel_state.get_pipeline_model_parallel_group()
    last = group.size() - 1
    if last:
        dist.broadcast(values, dist.get_global_rank(group, last), group=group)
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    return values
