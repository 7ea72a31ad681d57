"""One batch forward and backward through Megatron's schedule."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from skv_dist.config.run import RunConfig
from skv_dist.data.batches import MicroBatch
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.wire.communicator import WireCommunicator
from skv_dist.parallel.wire.widths import wire_widths
from skv_dist.routing import RoutePlan

Work = tuple[MicroBatch, RoutePlan]


@dataclass(frozen=True)
class BatchOutcome:
    """What one batch gave.

    Attributes:
        loss: float32 scalar, mean over the global batch in nats per prediction, the same on all ranks.
        wire_bytes: what this rank sent to other pipeline stages.
    """

    loss: torch.Tensor
    wire_bytes: int


def count_tokens(batches: Sequence[MicroBatch]) -> torch.Tensor:
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
    tokens: torch.Tensor,
    train: bool,
) -> BatchOutcome:
    """Run the micro-batches of one global batch that fall to this replica.

    The loss of the batch is the mean over all its counted predictions, so it does not depend on how the batch is cut.

    Args:
        batches: this replica's micro-batches, on the device.
        plans: the route plan of each.
        tokens: predictions that count in the whole global batch (`count_tokens`).
        train: also run backward, leaving gradients in the engine.
    """
    replicas = parallel_state.get_data_parallel_world_size()
    # Gradients are averaged over replicas afterwards.
    tokens = tokens.clamp(min=1.0)
    scale = (replicas / tokens).float()
    chunks: list[Any] = list(engine.root.chunks)
    widths = wire_widths(run, plans)

    def forward_step(work: Iterator[Work], chunk: Any) -> tuple[torch.Tensor, Any]:
        batch, plan = next(work)
        out = engine.forward(
            chunk.vp_stage or 0, plan, batch.tokens, batch.labels, batch.documents, chunk.take_input(), widths.padded
        )

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            total = (output * batch.loss_mask).sum()
            # Megatron would count tokens and divide by them; the division is already in our scale.
            return total * scale, torch.zeros([], dtype=torch.int, device=total.device), total.detach()

        return out, loss

    if engine.root.training != train:  # it walks through all modules
        engine.root.train(train)
    stage, last = parallel_state.get_pipeline_model_parallel_rank(), run.parallel.pipeline - 1
    communicator = WireCommunicator(
        parallel_state.get_pipeline_model_parallel_group(),
        chunks[0].config,
        widths.behind(stage - 1),
        widths.behind(stage),
    )
    interleaved = len(chunks) > 1
    work = list(zip(batches, plans, strict=True))
    with torch.set_grad_enabled(train):
        totals = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(work) for _ in chunks] if interleaved else iter(work),
            model=chunks if interleaved else chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=not train,
            p2p_communicator=communicator,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    if train:
        engine.add_tied_gradient()
    total = torch.stack(totals).sum() if stage == last else torch.zeros([], device=batches[0].tokens.device)
    if last:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(total, dist.get_global_rank(group, last), group=group)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return BatchOutcome((total / tokens).float(), communicator.sent_bytes)
