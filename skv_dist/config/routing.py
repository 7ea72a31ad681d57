"""``routing``: which layer's K/V each layer attends to while training."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from skv_dist.config.section import Section

Probability = Annotated[float, Field(ge=0, le=1)]
Step = Annotated[int, Field(ge=0)]


class RoutingConfig(Section):
    policy: Literal["none", "r_cla", "cla", "rd_cla", "suffix", "subset", "fixed"] = "r_cla"
    cross_prob: Probability | list[tuple[Step, Probability]] = 0.5
    window: int | None = Field(default=None, gt=0)
    group_size: int = Field(default=2, gt=0)
    shared_layers: int = Field(default=1, ge=0)
    keep_probs: Literal["uniform"] | list[Probability] = [1.0, 0.5, 0.25]
    kv_source_layers: list[int] | None = None
    within_stage: bool = False

    @field_validator("cross_prob")
    @classmethod
    def _steps_ascend(cls, value: object) -> object:
        if isinstance(value, list):
            steps = [step for step, _ in value]
            if not steps or any(b <= a for a, b in zip(steps, steps[1:])):
                raise ValueError("a schedule is a list of [step, probability] with ascending steps")
        return value

    @model_validator(mode="after")
    def _lists_not_empty(self) -> "RoutingConfig":
        if self.keep_probs == []:
            raise ValueError("keep_probs must not be empty")
        if self.kv_source_layers is not None and self.policy != "fixed":
            raise ValueError(f"kv_source_layers is read by policy 'fixed' only, but policy is '{self.policy}'")
        if self.within_stage and self.policy == "fixed":
            raise ValueError(
                "within_stage: true and policy 'fixed' do not work together: write kv_source_layers so that no source "
                "lies in an earlier stage, and set routing.within_stage=false"
            )
        return self
