"""What a checkpoint notes of the data, and whether a run may go on with the data that it has now."""

from collections.abc import Sequence
from typing import Any

from skv_dist.config.data import DataConfig
from skv_dist.data.open import Blend
from skv_dist.data.split import SplitRule
from skv_dist.data.stream import StreamingSet
from skv_dist.errors import UserError


def data_state(rule: SplitRule, samples: Blend | StreamingSet) -> dict[str, Any]:
    """The entry ``data`` of ``state.json``."""
    return {"rule": str(rule), "contents": samples.contents}


def check_goes_on(
    state: dict[str, Any],
    before: DataConfig,
    now: DataConfig,
    samples: Blend | StreamingSet,
    allow_changed: Sequence[str],
) -> None:
    """Refuse to go on where the position of the checkpoint would mean other text.

    Args:
        state: ``state.json`` of the checkpoint, written with the section ``before``.
        samples: the training samples as they are now.

    Raises:
        UserError: sequences have another length, or a source says something else.
    """
    if before.sequence_length != now.sequence_length and state["step"] > 0:
        raise UserError(
            f"data.sequence_length was {before.sequence_length} and is {now.sequence_length}: sequences of another "
            "length are cut and shuffled anew, so which text the run has read would be lost; begin a new run with the "
            "weights of the checkpoint by checkpoint.init_from and another train.output_dir"
        )
    contents = state.get("data", {}).get("contents")
    if contents and contents != samples.contents and "data.sources" not in allow_changed:
        changed = [s.path for s, was, is_now in zip(now.sources, contents, samples.contents) if was != is_now]
        raise UserError(
            f"the content of data source '{', '.join(changed) or now.sources[0].path}' has changed since the "
            "checkpoint: restore it, or set checkpoint.allow_changed=[data.sources] to go on at the same position of "
            "the new data"
        )
