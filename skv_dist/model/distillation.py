"""Loss on the labels and distance to a teacher, over a vocabulary that is split over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist

from skv_dist.model.cross_entropy import blocks_of, compiled_once, statistics


class _VocabParallelDistillation(torch.autograd.Function):
    """As `skv_dist.model.cross_entropy`, with the teacher's logits beside: fp32 exists only for a block of rows.

    Axes: s sequence, b batch, n = s * b tokens, v vocabulary on this rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor,
        first: int,
        valid: int,
        group: Any,
        compiled: bool,
    ) -> torch.Tensor:
        """logits and teacher [s, b, v], labels [s, b] -> cross-entropy and divergence, [2, s, b].

        Args:
            first: vocabulary entry of this rank's first column.
            valid: columns that are no padding.
        """
        rows, known = logits.view(-1, logits.shape[-1]), teacher.reshape(-1, teacher.shape[-1])  # [n, v] each
        column = labels.reshape(-1) - first  # [n]
        is_local = (column >= 0) & (column < valid)  # [n]: this rank has the label's logit
        column = torch.where(is_local, column, 0)[:, None]  # [n, 1]
        maxima = torch.full((2, rows.shape[0]), float("-inf"), dtype=torch.float32, device=rows.device)
        sums = torch.zeros(4, rows.shape[0], dtype=torch.float32, device=rows.device)
        if valid > 0:
            measure = compiled_once(_statistics_of_both) if compiled else _statistics_of_both
            blocks = zip(blocks_of(rows, compiled), blocks_of(known, compiled))
            parts = [measure(block[:, :valid], known_block[:, :valid]) for block, known_block in blocks]
            maxima, sums[:3] = (torch.cat(part, dim=1) for part in zip(*parts))
            sums[3] = rows.gather(1, column).squeeze(1).float() * is_local
        if group is not None:
            highest = maxima.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            scale = (maxima - highest).exp()
            sums[0] *= scale[0]
            sums[1:3] *= scale[1]
            dist.all_reduce(sums, group=group)
            maxima = highest
        log_normalizer, log_known = maxima + sums[:2].log()  # [n] each
        label_logit = sums[3]
        divergence = sums[2] / sums[1] - log_known + log_normalizer
        ctx.save_for_backward(logits, teacher, log_normalizer, log_known, label_logit, column, is_local)
        ctx.valid, ctx.compiled = valid, compiled
        return torch.stack([log_normalizer - label_logit, divergence]).view(2, *labels.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """grad [2, s, b] -> the logits' own memory [s, b, v], which now holds their gradient."""
        logits, teacher, log_normalizer, log_known, label_logit, column, is_local = ctx.saved_tensors
        rows, known = logits.view(-1, logits.shape[-1]), teacher.reshape(-1, teacher.shape[-1])  # [n, v] each
        valid = ctx.valid
        of_labels, of_teacher = grad.reshape(2, -1).float()  # [n] each
        with torch.no_grad():
            if valid > 0:
                known_at_label = known.gather(1, column).squeeze(1).float()  # [n]
                of_label = (label_logit - log_normalizer).exp() * (of_labels + of_teacher) - of_labels
                of_label -= (known_at_label - log_known).exp() * of_teacher
            to_gradient_ = compiled_once(_to_gradient_) if ctx.compiled else _to_gradient_
            blocks, known_blocks = blocks_of(rows, ctx.compiled), blocks_of(known, ctx.compiled)
            sizes = [block.shape[0] for block in blocks]
            vectors = (log_normalizer, log_known, of_labels, of_teacher)
            for block, known_block, *parts in zip(blocks, known_blocks, *(vector.split(sizes) for vector in vectors)):
                to_gradient_(block[:, :valid], known_block[:, :valid], *parts)
            if valid > 0:
                others = rows.gather(1, column)  # [n, 1]
                rows.scatter_(1, column, torch.where(is_local[:, None], of_label[:, None].to(rows.dtype), others))
            rows[:, valid:] = 0
        return logits, None, None, None, None, None, None


def _statistics_of_both(rows: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rows and known [m, v] -> maxima [2, m] of both; sums [3, m] over v of exp(rows - maximum), of
    exp(known - maximum), and of the latter times (known - rows).
    """
    maximum, exp_sum = statistics(rows)
    known_maximum = known.amax(dim=-1).float()
    weights = (known.float() - known_maximum[:, None]).exp()
    gaps = (weights * (known.float() - rows.float())).sum(dim=-1)
    return torch.stack([maximum, known_maximum]), torch.stack([exp_sum, weights.sum(dim=-1), gaps])


def _to_gradient_(
    rows: torch.Tensor,
    known: torch.Tensor,
    log_normalizer: torch.Tensor,
    log_known: torch.Tensor,
    of_labels: torch.Tensor,
    of_teacher: torch.Tensor,
) -> None:
    """rows [m, v]: logits to their gradient but for the label's own part, in place. The other arguments but known: [m].

    A cross-entropy against any distribution q has the gradient softmax - q.
    """
    own = (rows.float() - log_normalizer[:, None]).exp() * (of_labels + of_teacher)[:, None]
    rows.copy_(own - (known.float() - log_known[:, None]).exp() * of_teacher[:, None])


def vocab_parallel_distillation(
    logits: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    rank: int,
    group: Any | None,
    compiled: bool = False,
) -> torch.Tensor:
    """For each token the cross-entropy with its label and KL(teacher || model), in nats: float32 [2, s, b].

    Args:
        logits: [s, b, v], this rank's part of the padded vocabulary. **Consumed**: backward overwrites it with its
            gradient.
        teacher: [s, b, v], those of the teacher; they get no gradient.
        labels, vocab_size, rank, group, compiled: see `vocab_parallel_cross_entropy`.
    """
    width = logits.shape[-1]
    first = rank * width
    valid = min(max(vocab_size - first, 0), width)
    return _VocabParallelDistillation.apply(logits, teacher.detach(), labels, first, valid, group, compiled)
