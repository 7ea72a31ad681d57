"""What a checkpoint notes of the data, and whether a run may go on with the data that it has now."""

import os
from collections.abc import Sequence
from typing import Any

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.data.lane_state import StreamOnDisk
from skv_dist.data.open import Blend
from skv_dist.data.split import SplitRule
from skv_dist.data.stream import HeldOutStream, TrainingStream
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError

Samples = Blend | TrainingStream
Validation = Blend | HeldOutStream | None


def data_state(rule: SplitRule, samples: Samples, validation: Validation) -> dict[str, Any]:
    """The entry ``data`` of ``state.json``."""
    state: dict[str, Any] = {"rule": str(rule), "contents": samples.contents}
    if validation is not None:
        state["validation_contents"] = validation.contents
    return state


def check_goes_on(
    state: dict[str, Any],
    before: DataConfig,
    now: DataConfig,
    samples: Samples,
    validation: Validation,
    allow_changed: Sequence[str],
    *,
    has_stream: bool,
) -> None:
    """Refuse to go on where the position of the checkpoint would mean other text.

    Args:
        state: ``state.json`` of the checkpoint, written with the section ``before``.
        samples: the training samples as they are now.
        validation: the samples to evaluate on as they are now.
        has_stream: whether the checkpoint says where the lanes of its stream are.

    Raises:
        UserError: sequences have another length, a source says something else, or a stream cannot go on.
    """
    goes_on_streaming = before.streaming and now.streaming
    if before.sequence_length != now.sequence_length and state["step"] > 0 and not goes_on_streaming:
        raise UserError(
            f"data.sequence_length was {before.sequence_length} and is {now.sequence_length}: sequences of another "
            "length are cut and shuffled anew, so which text the run has read would be lost; begin a new run with the "
            "weights of the checkpoint by checkpoint.init_from and another train.output_dir"
        )
    if goes_on_streaming and not has_stream and "data.stream_lanes" not in allow_changed:
        raise UserError(
            "the checkpoint does not say how far its stream was read, as it is of an earlier version: set "
            "checkpoint.allow_changed=[data.stream_lanes] to read the text from its beginning again, in a new order, "
            "or begin a new run with its weights by checkpoint.init_from"
        )
    noted = state.get("data", {})
    # A stream of an earlier version noted nothing; text that is streamed and text that was prepared have no digest in
    # common, and who changes between them has named data.streaming.
    if before.streaming == now.streaming:
        _check_contents("data.sources", now.sources, noted.get("contents"), samples, allow_changed)
        if now.validation_sources and before.validation_sources:
            _check_contents(
                "data.validation_sources",
                now.validation_sources,
                noted.get("validation_contents"),
                validation,
                allow_changed,
            )


def restore_stream(samples: Samples, stream: StreamOnDisk | None, state: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Where the samples are a stream, go on from its state in a checkpoint; what has to begin anew is said once.

    Args:
        stream: ``stream.json`` of the checkpoint, if it has one.
        state: its ``state.json``.
    """
    if not isinstance(samples, TrainingStream):
        return
    anew = samples.restore(stream, state["samples"], keep_tokens=state["tokenizer"] in tokenizer.fingerprints())
    if anew and os.environ.get("RANK", "0") == "0":
        print(f"read from the beginning, in a new order: {', '.join(anew)}", flush=True)


def _check_contents(
    key: str,
    sources: Sequence[SourceConfig],
    before: list[str] | None,
    samples: Samples | Validation,
    allow_changed: Sequence[str],
) -> None:
    if not before or samples is None or before == samples.contents or key in allow_changed:
        return
    changed = [source.path for source, was, now in zip(sources, before, samples.contents) if was != now]
    raise UserError(
        f"the content of data source '{', '.join(changed) or sources[0].path}' has changed since the checkpoint: "
        f"restore it, or set checkpoint.allow_changed=[{key}] to go on {_GOING_ON[key]}"
    )


_GOING_ON = {
    "data.sources": "at the same position of the new data (a stream: from its beginning)",
    "data.validation_sources": "with the new text to evaluate on",
}
