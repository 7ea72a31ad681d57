"""Cross-entropy over a vocabulary that is split over tensor-parallel ranks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

_CHUNK_BYTES = 64 << 20  # of fp32 logits held at a time
_INDEXABLE = 2**31  # elements that a compiled kernel addresses in 32 bits


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Per-token loss; keeps the logits in their own dtype and turns them into their gradient in place.

    Megatron's version keeps the softmax of all tokens in fp32: for 16k tokens and a vocabulary of 152k that is 10 GB.
    Here fp32 exists only for a block of rows at a time, in both passes; compiled, only in registers.

    Axes: s sequence, b batch, n = s * b tokens, v vocabulary on this rank.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, first: int, valid: int, group: Any, compiled: bool
    ) -> torch.Tensor:
        """logits [s, b, v], labels [s, b] -> [s, b].

        Args:
            first: vocabulary entry of this rank's first column.
            valid: columns that are no padding.
        """
        rows = logits.view(-1, logits.shape[-1])  # [n, v]
        column = labels.reshape(-1) - first  # [n]
        is_local = (column >= 0) & (column < valid)  # [n]: this rank has the label's logit
        column = torch.where(is_local, column, 0)[:, None]  # [n, 1]
        maximum = torch.full((rows.shape[0],), float("-inf"), dtype=torch.float32, device=rows.device)  # [n]
        exp_sum, label_logit = torch.zeros_like(maximum), torch.zeros_like(maximum)  # [n] each
        if valid > 0:
            measure = compiled_once(statistics) if compiled else statistics
            parts = [measure(block[:, :valid]) for block in blocks_of(rows, compiled)]
            maximum, exp_sum = map(torch.cat, zip(*parts))
            label_logit = rows.gather(1, column).squeeze(1).float() * is_local
        if group is not None:
            highest = maximum.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([exp_sum * (maximum - highest).exp(), label_logit])  # [2, n]
            dist.all_reduce(sums, group=group)
            maximum, (exp_sum, label_logit) = highest, sums
        log_normalizer = maximum + exp_sum.log()
        ctx.save_for_backward(logits, log_normalizer, label_logit, column, is_local)
        ctx.valid, ctx.compiled = valid, compiled
        return (log_normalizer - label_logit).view_as(labels)  # [n] -> [s, b]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """grad [s, b] -> the logits' own memory [s, b, v], which now holds their gradient."""
        logits, log_normalizer, label_logit, column, is_local = ctx.saved_tensors
        rows, valid = logits.view(-1, logits.shape[-1]), ctx.valid  # [n, v]
        weight = grad.reshape(-1).float()  # [n]
        with torch.no_grad():
            to_gradient_ = compiled_once(_to_gradient_) if ctx.compiled else _to_gradient_
            blocks = blocks_of(rows, ctx.compiled)
            sizes = [block.shape[0] for block in blocks]
            for block, normalizers, weights in zip(blocks, log_normalizer.split(sizes), weight.split(sizes)):
                to_gradient_(block[:, :valid], normalizers, weights)
            if valid > 0:
                of_label = ((label_logit - log_normalizer).exp() - 1) * weight  # [n]
                softmax_part = rows.gather(1, column)  # [n, 1]
                rows.scatter_(1, column, torch.where(is_local[:, None], of_label[:, None].to(rows.dtype), softmax_part))
            rows[:, valid:] = 0
        return logits, None, None, None, None, None


def statistics(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [m, v] -> of each row the maximum and the sum of exp(logit - maximum), float32 [m]."""
    maximum = rows.amax(dim=-1).float()
    return maximum, (rows.float() - maximum[:, None]).exp().sum(dim=-1)


def _to_gradient_(rows: torch.Tensor, log_normalizer: torch.Tensor, weight: torch.Tensor) -> None:
    """rows [m, v]: logits to softmax times ``weight`` [m], in place."""
    rows.copy_((rows.float() - log_normalizer[:, None]).exp() * weight[:, None])


@functools.cache
def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function over blocks of rows, compiled at its first call."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def blocks_of(rows: torch.Tensor, compiled: bool) -> Sequence[torch.Tensor]:
    """rows [n, v] cut along n; in equal parts if compiled, so that there is one shape to compile for."""
    if compiled:
        return rows.chunk(-(-rows.numel() // _INDEXABLE))
    return rows.split(max(1, _CHUNK_BYTES // (4 * rows.shape[1])))


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, rank: int, group: Any | None, compiled: bool = False
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
        compiled: run one compiled kernel in each pass, instead of a chain of them over blocks of rows.
    """
    width = logits.shape[-1]
    first = rank * width
    valid = min(max(vocab_size - first, 0), width)
    return _VocabParallelCrossEntropy.apply(logits, labels, first, valid, group, compiled)
