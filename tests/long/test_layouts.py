"""Every layout that up to four processes hold, and costly ones of other models; the short suite runs a selection."""

from typing import Any

import pytest

from tests.support.compare import compare, needs_compiler
from tests.support.layouts import VARIANTS, Layout, every_layout


@pytest.mark.parametrize("layout", [*every_layout(), *every_layout(engine="fsdp")], ids=str)
def test_layout_equals_one_process(workers: Any, layout: Layout) -> None:
    compare(workers, layout.processes, layout.settings())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v)))
@pytest.mark.parametrize("zero_stage", range(4))
def test_model_variants_equal_one_process(workers: Any, variant: dict[str, Any], zero_stage: int) -> None:
    layout = Layout(tensor=2, sequence_parallel=True, replicas=2, zero_stage=zero_stage, recompute="full")
    compare(workers, layout.processes, layout.settings(**variant))


@needs_compiler
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=4),
        Layout(tensor=2, replicas=2, zero_stage=3),
        Layout(replicas=2, zero_stage=2),
        Layout(pipeline=2, virtual_pipeline=2, recompute="full"),
    ],
    ids=str,
)
def test_compiled_equals_one_process(workers: Any, layout: Layout) -> None:
    compare(workers, layout.processes, layout.settings(train={"compile": True, "micro_batch_size": 2}))


@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v)))
def test_compiled_model_variants_equal_one_process(workers: Any, variant: dict[str, dict[str, Any]]) -> None:
    compare(workers, 1, Layout().settings(**variant, train={"compile": True}))
