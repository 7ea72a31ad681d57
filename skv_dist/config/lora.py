"""``lora``: training low-rank additions to weights that stay."""

from typing import Literal, get_args

from pydantic import Field, field_validator

from skv_dist.config.section import Section

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(Section):
    """Low-rank adaptation: weights stay, and each target module learns a small addition (arXiv 2106.09685). What is
    added is a product of two small matrices. Conventions are those of peft, whose folders skv-convert to-peft writes;
    other exports hold the sums. Not with DeepSpeed's parallel.zero_stage 3."""

    rank: int = Field(default=0, ge=0)
    """Inner size of the product. 0: no adapters, all weights learn (but for train.freeze)."""

    alpha: float = Field(default=16.0, gt=0)
    """What is added is alpha / rank times the product."""

    target_modules: list[Target] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    """The projections that get an adapter, in every layer, by their names in Hugging Face models. A model without a
    gate has no gate_proj."""

    @field_validator("target_modules")
    @classmethod
    def _some(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) < len(value):
            raise ValueError("target_modules needs at least one module, and each once")
        return [name for name in get_args(Target) if name in value]  # in whatever order they were given

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank
