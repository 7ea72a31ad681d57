"""The parity tests can fail: each fault that trains happily with wrong gradients turns the comparison red."""

from typing import Any

import numpy as np
import pytest

from tests.support import faults
from tests.support.compare import TOLERANCE, check, mean_gap, needs_compiler, one_process
from tests.support.jobs import parity
from tests.support.layouts import SMALL, Layout
from tests.support.settings import config


def named(fault: Any, layout: Layout) -> Any:
    marks = [needs_compiler] if fault is faults.gradients_reduced_as_they_arrive else []
    return pytest.param(fault.__name__, layout, marks=marks, id=f"{fault.__name__}-{layout}")


@pytest.mark.parametrize(("fault", "layout"), [named(*case) for case in [*faults.FAULTS, *faults.FSDP_FAULTS]])
def test_fault_is_noticed(workers: Any, fault: str, layout: Layout) -> None:
    settings = layout.settings(train={"compile": fault == "gradients_reduced_as_they_arrive"})
    # Without the flag's cure the gradients are wrong, and the second step fails as well: none is made.
    steps = 0 if fault == "backward_seen_flag_kept" else parity.STEPS
    expected = one_process(workers, settings, steps)
    found = workers(layout.processes)(parity.train, settings, steps, fault)[0]
    with pytest.raises(AssertionError):
        check(found, expected, 5 * TOLERANCE)  # above what rounding does to a right layout


def test_every_fault_is_tried() -> None:
    made_here = {name for name, value in vars(faults).items() if getattr(value, "__module__", "") == faults.__name__}
    elsewhere = {
        "clipped_by_default",  # below
        *("gathered_parameters_kept", "late_reduction_left_out", "passes_without_end"),  # engines/test_fsdp
        "routes_within_two_stages",  # test_pipeline
        "sent_tensor_emptied",  # test_wire
        *("adapters_drawn", "adapters_not_summed", "adapters_unscaled"),  # test_lora
        *("teacher_borrows", "teacher_learns_from_itself", "teacher_of_the_batch_before"),  # test_distillation
    }
    others = {"applied", *elsewhere}
    public = {name for name in made_here if not name.startswith("_")}
    assert public - others == {fault.__name__ for fault, _ in [*faults.FAULTS, *faults.FSDP_FAULTS]}


def test_clipping_is_what_the_configuration_says(workers: Any) -> None:
    """DeepSpeed clips at 1.0 where nothing is set."""

    def gradients(zero: int, fault: str | None = None) -> dict[str, np.ndarray]:
        settings = config(parallel={"zero_stage": zero}, model={"init_std": 0.3}, optimizer={"clip_grad_norm": 0.0})
        found = workers(2)(parity.train, settings, 0, fault, False)[0]
        assert found["norms"][0] > 2
        return found["gradients"]

    expected = gradients(0)
    name = "final_norm.weight"
    np.testing.assert_allclose(gradients(1)[name], expected[name], rtol=1e-4, atol=1e-6)
    assert np.abs(gradients(1, "clipped_by_default")[name]).max() < 0.6 * np.abs(expected[name]).max()


@pytest.mark.parametrize(("zero", "precision"), [(2, "fp32"), (1, "bf16")])
def test_two_backwards_without_a_forward_between_them(workers: Any, zero: int, precision: str) -> None:
    """As in every pipeline's cool-down. Without the hook DeepSpeed drops the second gradient."""
    settings = config(parallel={"zero_stage": zero}, train={"precision": precision}, optimizer={"clip_grad_norm": 0.0})
    norms = {hook: workers(2)(parity.two_backwards, settings, hook)[0] for hook in (True, False)}
    together, apart = norms[True]
    assert together == pytest.approx(apart, rel=1e-5 if precision == "fp32" else 1e-2)
    together, apart = norms[False]
    assert together != pytest.approx(apart, rel=5e-2)


def test_bf16_accumulates_in_fp32(workers: Any) -> None:
    """bf16 gradients of many micro-batches are as close to fp32's as those of the engine without DeepSpeed."""
    expected = one_process(workers, config(model=SMALL))

    def error(parallel: dict[str, Any], processes: int) -> float:
        settings = config(model=SMALL, parallel=parallel, train={"precision": "bf16"})
        found = workers(processes)(parity.train, settings)[0]
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=5e-3)
        np.testing.assert_allclose(found["norms"], expected["norms"], rtol=5e-2)
        return mean_gap(found["gradients"], expected["gradients"])

    plain = error({"zero_stage": 0}, 1)
    assert plain < 0.1
    for parallel, processes in (
        ({"zero_stage": 1}, 2),
        ({"zero_stage": 2, "tensor": 2, "sequence_parallel": True}, 4),
        ({"zero_stage": 3}, 1),
        ({"zero_stage": 1, "engine": "fsdp"}, 2),
        ({"zero_stage": 3, "engine": "fsdp", "pipeline": 2}, 4),
    ):
        assert error(parallel, processes) < 1.5 * plain, parallel
