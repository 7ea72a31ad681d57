"""Learning-rate schedules, the guard, the numbers that are reported."""

import math

import pytest

from skv_dist.config.train import OptimizerConfig, TrainConfig
from skv_dist.errors import UserError
from skv_dist.training.guard import Guard
from skv_dist.training.schedule import lr_at


def optimizer(**keys: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"lr": 2.0, "warmup_fraction": 0.1, "min_lr_ratio": 0.25, **keys})


def test_warm_up_rises_to_the_peak_and_does_not_start_at_zero() -> None:
    rates = [lr_at(step, 100, optimizer()) for step in range(12)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert lr_at(0, 100, optimizer(warmup_steps=0)) == 2.0


def test_shapes() -> None:
    for schedule, middle in (("cosine", 0.625), ("linear", 0.625), ("constant", 1.0), ("wsd", 1.0)):
        config = optimizer(schedule=schedule)
        assert lr_at(55, 100, config) == pytest.approx(2.0 * middle)
        end = 1.0 if schedule == "constant" else 0.25
        assert lr_at(100, 100, config) == pytest.approx(2.0 * end)
    wsd = optimizer(schedule="wsd", decay_fraction=0.2)
    assert lr_at(80, 100, wsd) == 2.0
    assert lr_at(90, 100, wsd) == pytest.approx(2.0 * 0.625)


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
