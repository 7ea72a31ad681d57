"""The guard against spikes."""

import math

import pytest

from skv_dist.config.train import TrainConfig
from skv_dist.errors import UserError
from skv_dist.training.guard import Guard


def guard(**keys: object) -> Guard:
    base = {"steps": 1, "output_dir": "x", "global_batch_size": 1, "micro_batch_size": 1, "spike_window": 3}
    return Guard(TrainConfig.model_validate({**base, "max_skipped_steps": 2, **keys}))


def test_spikes_and_nan_are_objected_to_and_do_not_move_the_median() -> None:
    watched = guard()
    assert watched.objection(math.nan) is not None
    for step, loss in enumerate([9.0, 1.0, 1.0]):
        assert watched.objection(loss * 100) is None  # the window is not full
        watched.record(step, loss, None)
    assert watched.objection(1.9) is None
    spike = watched.objection(2.1)
    assert spike is not None
    watched.record(3, 2.1, spike)
    assert watched.skipped == 1
    assert watched.objection(2.1) is not None
    assert guard(spike_factor=None).objection(1e9) is None


def test_too_many_skips_in_a_row_end_the_run() -> None:
    watched = guard()
    watched.record(1, math.nan, "bad")
    watched.record(2, 1.0, None)
    watched.record(3, math.nan, "bad")
    with pytest.raises(UserError, match="2 steps in a row"):
        watched.record(4, math.nan, "bad")
