"""The base of all configuration sections."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A typed, immutable part of the run configuration. Unknown keys are errors; numbers are never guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
