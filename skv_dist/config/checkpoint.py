"""``checkpoint``: what a run leaves on disk, and what it starts from."""

from pydantic import Field, model_validator

from skv_dist.config.section import Section


class CheckpointConfig(Section):
    every: int = Field(default=0, ge=0)
    at_end: bool = True
    keep_last: int | None = Field(default=2, gt=0)
    keep_every: int | None = Field(default=None, gt=0)
    resume: str = Field(default="auto", min_length=1)
    allow_changed: list[str] = []
    init_from: str | None = None
    async_save: bool = True

    @model_validator(mode="after")
    def _one_start(self) -> "CheckpointConfig":
        if self.init_from is not None and self.resume not in ("auto", "never"):
            raise ValueError(
                f"init_from '{self.init_from}' and resume '{self.resume}' both name what to start from: "
                "set checkpoint.resume=auto or leave checkpoint.init_from out"
            )
        return self
