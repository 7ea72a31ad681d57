"""``parallel``: how the run is spread over processes."""

from typing import Literal

from pydantic import Field, model_validator

from skv_dist.config.section import Section


class ParallelConfig(Section):
    tensor: int = Field(default=1, gt=0)
    sequence_parallel: bool = False
    pipeline: int = Field(default=1, gt=0)
    virtual_pipeline: int = Field(default=1, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 1
    zero_bucket_mb: int = Field(default=256, gt=0)
    overlap_comm: bool = False
    timeout_minutes: float = Field(default=30, gt=0)

    @model_validator(mode="after")
    def _supported(self) -> "ParallelConfig":
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel: true needs tensor > 1: set parallel.sequence_parallel=false")
        if self.pipeline > 1 or self.virtual_pipeline > 1:
            raise ValueError(
                "pipeline and virtual_pipeline above 1 are not supported yet: "
                "set parallel.pipeline=1 and parallel.virtual_pipeline=1"
            )
        return self
