"""What `FsdpEngine` holds whole at which time, and what follows where it forgets to give it up."""

from typing import Any

import pytest

from tests.support.compare import mean_gap, one_process
from tests.support.jobs import fsdp
from tests.support.layouts import SMALL
from tests.support.settings import config

ROWS, WHOLE, REDUCED = (False, False), (True, False), (False, True)  # (weight is whole, rows have a gradient)


def settings(zero_stage: int) -> dict[str, Any]:
    return config(model=SMALL, parallel={"engine": "fsdp", "zero_stage": zero_stage})


@pytest.mark.parametrize(
    ("zero_stage", "forward", "backward"), [(1, WHOLE, WHOLE), (2, WHOLE, (True, True)), (3, ROWS, REDUCED)]
)
def test_a_stage_shards_what_it_says(workers: Any, zero_stage: int, forward: Any, backward: Any) -> None:
    expected = {
        "made": ROWS,
        "forward": forward,
        "backward": backward,
        "step": ROWS,
        "evaluated": ROWS,
        "remembered": 0,
    }
    assert workers(2)(fsdp.states, settings(zero_stage)) == [expected] * 2


def test_passes_without_end_are_noticed(workers: Any) -> None:
    """Weights would stay whole, and what FSDP remembers of each pass would grow for ever."""
    found = workers(2)(fsdp.states, settings(2), "passes_without_end")[0]
    assert found["evaluated"] == WHOLE
    assert found["remembered"] > 0


@pytest.mark.parametrize("fault", ["gathered_parameters_kept", "late_reduction_left_out"])
def test_an_update_that_is_not_seen_is_noticed(workers: Any, fault: str) -> None:
    given = settings(1)
    expected = one_process(workers, given)["losses"][1:]  # the first is of another batch
    assert workers(2)(fsdp.losses, given, 2)[0] == pytest.approx(expected, rel=1e-5)
    assert workers(2)(fsdp.losses, given, 2, fault)[0] != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bf16_gradients_are_summed_in_fp32(workers: Any, zero_stage: int) -> None:
    """A batch that comes sixteen times has exactly sixteen times the gradient, whenever replicas are added up."""

    def gradients(stage: int, times: int) -> Any:
        given = config(model=SMALL, parallel=settings(stage)["parallel"], train={"precision": "bf16"})
        return workers(2)(fsdp.repeated, given, times)[0]

    often = gradients(zero_stage, 16)
    assert mean_gap({name: value / 16 for name, value in often.items()}, gradients(1, 1)) < 1e-6


def test_a_model_is_made_without_memory(workers: Any) -> None:
    assert workers(1)(fsdp.made_without_memory) == [True]
