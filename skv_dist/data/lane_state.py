"""Where the lanes of a stream are, in memory and in a checkpoint: JSON, checked field by field when it is read."""

import base64
import binascii
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

NO_TOKENS = np.empty(0, dtype=np.int64)
NO_ANSWERS = np.empty(0, dtype=bool)


@dataclass(frozen=True)
class LaneState:
    """Where a lane is in a source.

    Attributes:
        epoch: how often it has come to the end of its share.
        part: which part of its share the block begins in.
        cursor: in that part, as `skv_dist.data.read_part` has it; None at the begin.
        taken: documents of the block that were tokenized.
        remaining: int64 [n], tokens of the last of them that no sample has led to yet; of a source of examples, those
            of whole examples that wait.
        lengths: of these examples.
        answers: bool [n], which of ``remaining`` a model is to answer; of a source of texts empty.
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
    lengths: tuple[int, ...] = ()
    answers: np.ndarray = field(default_factory=lambda: NO_ANSWERS)

    @property
    def without_tokens(self) -> "LaneState":
        """The same place, where the tokens that are left are of no use."""
        return replace(self, remaining=NO_TOKENS, lengths=(), answers=NO_ANSWERS)

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("epoch", "part", "cursor", "taken", "num_rows")}
        tokens = base64.b64encode(self.remaining.astype("<i4").tobytes()).decode()
        written = {**values, "remaining": tokens, "skipped": dict(self.skipped)}
        if self.lengths:
            marks = base64.b64encode(np.packbits(self.answers).tobytes()).decode()
            written |= {"lengths": list(self.lengths), "answers": marks}
        return written


_Count = Annotated[int, Field(ge=0)]


class LaneStateOnDisk(BaseModel):
    """A `LaneState` as a checkpoint holds it; ``remaining`` is base64 of int32, little-endian, ``answers`` of bits."""

    model_config = ConfigDict(strict=True, extra="forbid")

    epoch: _Count
    part: _Count
    cursor: _Count | None
    taken: _Count
    num_rows: _Count
    remaining: str
    skipped: dict[str, _Count]
    lengths: list[Annotated[int, Field(gt=0)]] = []
    answers: str = ""

    def state(self) -> LaneState:
        """Raises ValueError where ``remaining`` or ``answers`` holds what it must not."""
        try:
            tokens = np.frombuffer(base64.b64decode(self.remaining, validate=True), dtype="<i4").astype(np.int64)
            marks = np.frombuffer(base64.b64decode(self.answers, validate=True), dtype=np.uint8)
        except binascii.Error as error:
            raise ValueError("remaining or answers is no base64") from error
        answers = np.unpackbits(marks).astype(bool)[: sum(self.lengths)]
        if self.lengths and not sum(self.lengths) == len(tokens) == len(answers):
            raise ValueError("lengths, remaining and answers do not go together")
        if len(tokens) and tokens.min() < 0:
            raise ValueError("remaining holds no tokens")
        values = {name: getattr(self, name) for name in ("epoch", "part", "cursor", "taken", "num_rows")}
        return LaneState(
            **values,
            remaining=tokens,
            skipped=tuple(sorted(self.skipped.items())),
            lengths=tuple(self.lengths),
            answers=answers,
        )


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
