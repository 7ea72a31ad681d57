"""Learning from a teacher, beside what torch itself gives."""

from typing import Any

from tests.support.engine import built, full_weights, made_engine, made_teacher, run_step


def over_vocabulary(compiled: bool) -> tuple[list[Any], list[Any]]:
    """(found, expected): cross-entropy [s, b], divergence [s, b] and gradient [s, b, v] for padded columns and large
    logits.
    """
    import torch
    from torch.nn import functional as F

    from skv_dist.model.distillation import vocab_parallel_distillation

    generator = torch.Generator().manual_seed(0)
    valid, padded = 37, 40
    logits, teacher = (20 * torch.randn(5, 3, padded, generator=generator) for _ in range(2))
    labels = torch.randint(valid, (5, 3), generator=generator)
    weights = torch.rand(2, 5, 3, generator=generator)

    own = logits[..., :valid].clone().requires_grad_()
    cross_entropy = F.cross_entropy(own.flatten(0, 1), labels.flatten(), reduction="none").view(5, 3)
    of_teacher = teacher[..., :valid].log_softmax(-1)
    divergence = F.kl_div(own.log_softmax(-1), of_teacher, reduction="none", log_target=True).sum(-1)
    (gradient,) = torch.autograd.grad((weights * torch.stack([cross_entropy, divergence])).sum(), own)

    leaf = logits.clone().requires_grad_()
    both = vocab_parallel_distillation(leaf * 1.0, teacher, labels, valid, 0, None, compiled)
    (found,) = torch.autograd.grad((weights * both).sum(), leaf)
    assert not found[..., valid:].any()
    expected = [cross_entropy, divergence, gradient]
    return [each.detach().numpy() for each in (*both, found[..., :valid])], [each.detach().numpy() for each in expected]


def one_step(settings: dict[str, Any]) -> tuple[list[float], list[float], bool]:
    """(found, expected, unchanged): loss and divergence of one batch, those from whole logits, and whether the
    teacher's weights are what they were.
    """
    import torch
    from torch.nn import functional as F

    from skv_dist.routing import RoutePlan
    from tests.support.batches import local_batches
    from tests.support.engine import drawn_plans

    with built(settings) as (run, world), made_engine(run, world) as engine:
        teacher = made_teacher(run, world)
        before = full_weights(teacher._engine, run)
        batches = local_batches(run, world, 0)
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for batch, plan in zip(batches, drawn_plans(run, batches, 0), strict=True):
                own = engine.forward(0, plan, batch.tokens).double().log_softmax(-1)
                full = RoutePlan(range(run.model.num_layers))
                known = teacher._engine.forward(0, full, batch.tokens).double().log_softmax(-1)
                losses = F.nll_loss(own.flatten(0, 1), batch.labels.flatten(), reduction="none").view_as(batch.labels)
                gaps = F.kl_div(own, known, reduction="none", log_target=True).sum(-1)
                sums += torch.stack([(losses * batch.loss_mask).sum(), (gaps * batch.loss_mask).sum()])
        count = sum(batch.loss_mask.sum().item() for batch in batches)
        outcome = run_step(engine, run, world, 0, teacher=teacher)
        engine.step()
        after = full_weights(teacher._engine, run)
        unchanged = all((before[name] == after[name]).all() for name in before)
        return [outcome.loss.item(), outcome.divergence.item()], (sums / count).tolist(), bool(unchanged)
