"""``train``, ``optimizer`` and ``eval``: the loop, the update and the measurements."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from skv_dist.config.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]
Retention = Annotated[float, Field(gt=0, le=1)]


class TrainConfig(Section):
    steps: int = Field(gt=0)
    seed: int = Field(default=1234, ge=0)
    output_dir: str = Field(min_length=1)
    global_batch_size: int = Field(gt=0)
    micro_batch_size: int = Field(gt=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: list[Literal["core_attn", "mlp"]] = ["core_attn"]
    compile: bool = False
    max_skipped_steps: int = Field(default=10, gt=0)
    spike_factor: float | None = Field(default=2.0, gt=1)
    spike_window: int = Field(default=100, gt=1)
    tensorboard: bool = True
    progress: bool = True


class OptimizerConfig(Section):
    lr: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_grad_norm: float = Field(default=1.0, ge=0)
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)


class EvalConfig(Section):
    every: int = Field(default=500, ge=0)
    samples: int = Field(default=64, gt=0)
    retention: list[Retention] = [1.0, 0.5, 0.33, 0.25]

    @field_validator("retention")
    @classmethod
    def _names_differ(cls, value: list[float]) -> list[float]:
        names = [f"{retention:.2f}" for retention in value]
        if not names or len(set(names)) < len(names):
            raise ValueError("retention needs at least one value, and values that differ in two decimals")
        return value
