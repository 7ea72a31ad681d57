"""One batch forward and backward through Megatron's schedule."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from skv_dist.data.batches import MicroBatch
from skv_dist.parallel.engine import Engine
from skv_dist.routing import RoutePlan

Work = tuple[MicroBatch, RoutePlan]


def count_tokens(batches: Sequence[MicroBatch], device: torch.device) -> float:
    """Number of predictions that count, over all micro-batches of all replicas."""
    count = torch.stack([batch.loss_mask.sum() for batch in batches]).sum().to(device)
    dist.all_reduce(count, group=parallel_state.get_data_parallel_group())
    return count.item()


def run_batch(
    engine: Engine, batches: Sequence[MicroBatch], plans: Sequence[RoutePlan], *, tokens: float, train: bool
) -> torch.Tensor:
    """Run the micro-batches of one global batch that fall to this replica.

    The loss of the batch is the mean over all its counted predictions, so it does not depend on how the batch is cut.

    Args:
        batches: this replica's micro-batches, on the device.
        plans: the route plan of each.
        tokens: predictions that count in the whole global batch (`count_tokens`).
        train: also run backward, leaving gradients in the engine.

    Returns:
        float32 scalar: mean loss over the global batch, the same on all ranks.
    """
    replicas = parallel_state.get_data_parallel_world_size()
    # Gradients are averaged over replicas afterwards.
    scale = replicas / max(tokens, 1.0)

    def forward_step(work: Iterator[Work], chunk: Any) -> tuple[torch.Tensor, Any]:
        batch, plan = next(work)
        losses = engine.forward(0, plan, batch.tokens, batch.labels, batch.documents)

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            total = (output * batch.loss_mask).sum()
            # Megatron would count tokens and divide by them; the division is already in our scale.
            return total * scale, torch.zeros([], dtype=torch.int, device=total.device), total.detach()

        return losses, loss

    engine.root.train(train)
    run = get_forward_backward_func()
    with torch.set_grad_enabled(train):
        totals = run(
            forward_step_func=forward_step,
            data_iterator=iter(list(zip(batches, plans, strict=True))),
            model=list(engine.root.chunks),
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=not train,
        )
    total = torch.stack(totals).sum()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total / max(tokens, 1.0)
