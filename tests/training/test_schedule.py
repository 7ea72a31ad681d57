"""Learning-rate schedules."""

import pytest

from skv_dist.config.train import OptimizerConfig
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
