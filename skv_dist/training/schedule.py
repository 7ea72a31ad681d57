"""Learning rate as a pure function of the step."""

import math

from skv_dist.config.train import OptimizerConfig


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    return round(config.warmup_fraction * steps) if config.warmup_steps is None else config.warmup_steps


def lr_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of the update ``step`` (0-based) in a run of ``steps``.

    Linear warm-up, then constant, cosine (Loshchilov and Hutter, arXiv 1608.03983), linear, or WSD: constant with a
    linear decay over the last ``decay_fraction`` of the run (Hu et al., arXiv 2404.06395).
    """
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    floor = config.min_lr_ratio
    if config.schedule == "constant":
        share = 1.0
    elif config.schedule == "wsd":
        decay = max(1, round(config.decay_fraction * steps))
        share = floor + (1 - floor) * min(1.0, (steps - step) / decay)
    else:
        done = (step - warmup) / max(1, steps - warmup)
        left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        share = floor + (1 - floor) * left
    return config.lr * share
