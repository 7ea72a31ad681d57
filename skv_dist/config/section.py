"""The base of all configuration sections."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A typed, immutable part of the run configuration. Unknown keys are errors; numbers are never guessed.

    The docstring of a section, and the one below each of its fields, are what users read: in configs/reference.yaml
    (made by skv_dist.config.reference) and from ``skv-train --explain``. They are plain sentences without markup, the
    first of which stands alone in lists; values of a key may be listed in lines that begin with "- ". A required field
    has an example, Field(examples=[...]).
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )
