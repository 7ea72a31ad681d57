"""Learning from a teacher: loss, divergence and gradients against torch's own, and in every layout."""

from typing import Any

import numpy as np
import pytest

from tests.support.compare import check, compare, needs_compiler, one_process
from tests.support.jobs import distillation, parity
from tests.support.layouts import SMALL
from tests.support.settings import config


def settings(
    weight: float = 0.7, recompute: str = "none", compiled: bool = False, tied: bool = True, **parallel: Any
) -> dict[str, Any]:
    return config(
        model={**SMALL, "tie_embeddings": tied},
        train={"recompute": recompute, "compile": compiled},
        parallel={"zero_stage": 0, **parallel},
        distillation={"weight": weight, "teacher": "unused"},
    )


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_loss_and_gradient_are_those_of_torch(workers: Any, compiled: bool) -> None:
    found, expected = workers(1)(distillation.over_vocabulary, compiled)[0]
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-6, atol=2e-6)


def test_the_teacher_runs_the_full_route_and_learns_nothing(workers: Any) -> None:
    found, expected, unchanged = workers(1)(distillation.one_step, settings())[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert unchanged


def test_weight_one_leaves_the_labels_out_and_zero_the_teacher(workers: Any) -> None:
    none = one_process(workers, settings(weight=0.0))
    half, whole = one_process(workers, settings(weight=0.5)), one_process(workers, settings(weight=1.0))
    for name, of_labels in none["gradients"].items():
        mean = (of_labels + whole["gradients"][name]) / 2
        np.testing.assert_allclose(half["gradients"][name], mean, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("processes", "changed"),
    [
        (1, {"recompute": "full"}),
        pytest.param(1, {"compiled": True}, marks=needs_compiler),
        (2, {"tensor": 2, "sequence_parallel": True}),
        (2, {"pipeline": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2, "recompute": "full"}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3}),
        (4, {"tensor": 2, "pipeline": 2, "tied": False, "sequence_parallel": True}),
        (4, {"engine": "fsdp", "zero_stage": 3, "pipeline": 2}),
    ],
    ids=str,
)
def test_layouts_equal_one_process(workers: Any, processes: int, changed: dict[str, Any]) -> None:
    compare(workers, processes, settings(**changed))


@pytest.mark.parametrize("fault", ["teacher_borrows", "teacher_learns_from_itself", "teacher_of_the_batch_before"])
def test_faults_are_noticed(workers: Any, fault: str) -> None:
    split = settings(pipeline=2)
    with pytest.raises(AssertionError):
        check(workers(2)(parity.train, split, parity.STEPS, fault)[0], one_process(workers, split))
