"""Cross-entropy over a vocabulary that is split over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist

_CHUNK_BYTES = 64 << 20  # of fp32 logits held at a time


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Per-token loss; keeps the logits in their own dtype and turns them into their gradient in place.

    Megatron's version keeps the softmax of all tokens in fp32: for 16k tokens and a vocabulary of 152k that is 10 GB.
    Here fp32 exists only for a block of rows at a time, in both passes.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, first: int, valid: int, group: Any
    ) -> torch.Tensor:
        rows = logits.view(-1, logits.shape[-1])
        local = labels.reshape(-1) - first
        mine = (local >= 0) & (local < valid)
        local = torch.where(mine, local, 0)
        maximum = torch.full((rows.shape[0],), float("-inf"), dtype=torch.float32, device=rows.device)
        if valid > 0:
            maximum = rows[:, :valid].amax(dim=-1).float()
        if group is not None:
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        sums = torch.zeros(2, rows.shape[0], dtype=torch.float32, device=rows.device)  # of exp; logit of the label
        if valid > 0:
            for block in _blocks(rows):
                shifted = rows[block, :valid].float() - maximum[block, None]
                sums[1, block] = shifted.gather(1, local[block, None]).squeeze(1) * mine[block]
                sums[0, block] = shifted.exp_().sum(dim=-1)
        if group is not None:
            dist.all_reduce(sums, group=group)
        log_sum = sums[0].log()
        ctx.save_for_backward(logits, maximum + log_sum, local, mine)
        ctx.valid = valid
        return (log_sum - sums[1]).view_as(labels)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, log_normalizer, local, mine = ctx.saved_tensors
        rows, valid = logits.view(-1, logits.shape[-1]), ctx.valid
        weight = grad.reshape(-1, 1).float()
        with torch.no_grad():
            for block in _blocks(rows):
                probability = (rows[block, :valid].float() - log_normalizer[block, None]).exp_()
                if valid > 0:
                    probability.scatter_add_(1, local[block, None], -mine[block, None].float())
                rows[block, :valid] = probability.mul_(weight[block]).to(rows.dtype)
            rows[:, valid:] = 0
        return logits, None, None, None, None


def _blocks(rows: torch.Tensor) -> list[slice]:
    size = max(1, _CHUNK_BYTES // (4 * rows.shape[1]))
    return [slice(begin, begin + size) for begin in range(0, rows.shape[0], size)]


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, rank: int, group: Any | None
) -> torch.Tensor:
    """Loss of each token, in nats, float32 [s, b].

    Args:
        logits: [s, b, v], this rank's part of the padded vocabulary. **Consumed**: backward overwrites it with its
            gradient.
        labels: int64 [s, b], the same on all ranks.
        vocab_size: size without padding. Padded entries take no part in the softmax, so that the loss does not depend
            on the tensor-parallel size.
        rank: this rank's place in ``group``.
        group: tensor-parallel process group; None for one rank.
    """
    width = logits.shape[-1]
    first = rank * width
    valid = min(max(vocab_size - first, 0), width)
    return _VocabParallelCrossEntropy.apply(logits, labels, first, valid, group)
