"""Where the lanes of a stream are, in memory and in a checkpoint: JSON, checked field by field when it is read."""

import base64
import binascii
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

NO_TOKENS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class LaneState:
    """Where a lane is in a source.

    Attributes:
        epoch: how often it has come to the end of its share.
        part: which part of its share the block begins in.
        cursor: in that part, as `skv_dist.data.read_part` has it; None at the begin.
        taken: documents of the block that were tokenized.
        remaining: int64 [n], tokens of the last of them that no sample has led to yet.
        num_rows: that were read before the block.
        skipped: how many of them held no text, by the reason.
    """

    epoch: int = 0
    part: int = 0
    cursor: int | None = None
    taken: int = 0
    remaining: np.ndarray = field(default_factory=lambda: NO_TOKENS)
    num_rows: int = 0
    skipped: tuple[tuple[str, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("epoch", "part", "cursor", "taken", "num_rows")}
        tokens = base64.b64encode(self.remaining.astype("<i4").tobytes()).decode()
        return {**values, "remaining": tokens, "skipped": dict(self.skipped)}


_Count = Annotated[int, Field(ge=0)]


class LaneStateOnDisk(BaseModel):
    """A `LaneState` as a checkpoint holds it; ``remaining`` is base64 of int32, little-endian."""

    model_config = ConfigDict(strict=True, extra="forbid")

    epoch: _Count
    part: _Count
    cursor: _Count | None
    taken: _Count
    num_rows: _Count
    remaining: str
    skipped: dict[str, _Count]

    def state(self) -> LaneState:
        """Raises ValueError where ``remaining`` holds no tokens."""
        try:
            tokens = np.frombuffer(base64.b64decode(self.remaining, validate=True), dtype="<i4").astype(np.int64)
        except binascii.Error as error:
            raise ValueError("remaining is no base64") from error
        if len(tokens) and tokens.min() < 0:
            raise ValueError("remaining holds no tokens")
        values = {name: getattr(self, name) for name in ("epoch", "part", "cursor", "taken", "num_rows")}
        return LaneState(**values, remaining=tokens, skipped=tuple(sorted(self.skipped.items())))


class _SourceOnDisk(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    order: str
    lanes: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], LaneStateOnDisk]


class StreamOnDisk(BaseModel):
    """What a checkpoint holds of a stream (``stream.json``).

    Attributes:
        position: samples that the run has read.
        next_lane: that serves the next micro-batch.
        sources: of each what its order follows from, and the lanes that have read from it.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[1]
    lanes: Annotated[int, Field(gt=0)]
    position: Annotated[int, Field(ge=0)]
    next_lane: Annotated[int, Field(ge=0)]
    sources: list[_SourceOnDisk]


def parse_stream(content: Any) -> StreamOnDisk:
    """What ``stream.json`` of a checkpoint says.

    Raises:
        ValueError: it is not what was written.
    """
    try:
        state = StreamOnDisk.model_validate(content)
    except ValidationError as error:
        raise ValueError(str(error)) from error
    for source in state.sources:
        for lane in source.lanes.values():
            lane.state()
    return state
