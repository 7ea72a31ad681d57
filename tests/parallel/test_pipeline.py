"""What only pipelines have, against one process: uneven stages, other models on the wire, routes within stages."""

from typing import Any

import pytest

from tests.support.compare import check, compare, mean_gap, one_process
from tests.support.jobs import parity
from tests.support.settings import BASE, config

VARIANTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "uneven": (2, {"parallel": {"pipeline": 2, "first_stage_layers": 3}}),
    "uneven at both ends": (4, {"parallel": {"pipeline": 4, "first_stage_layers": 3, "last_stage_layers": 1}}),
    "uneven and interleaved": (
        2,
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2, "last_stage_layers": 2}, "model": {"tie_embeddings": True}},
    ),
    "fewer KV heads than tensor ranks": (
        4,
        {"parallel": {"pipeline": 2, "tensor": 2, "sequence_parallel": True}, "model": {"num_kv_heads": 1}},
    ),
    "attention within documents": (2, {"parallel": {"pipeline": 2}, "data": {"reset_attention": True}}),
    "layer norm and GELU": (
        2,
        {"parallel": {"pipeline": 2}, "model": {"norm": "layernorm", "activation": "gelu", "qk_norm": False}},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_one_process(workers: Any, name: str) -> None:
    processes, sections = VARIANTS[name]
    compare(workers, processes, config(**sections))


def test_routes_within_stages_equal_one_process_with_the_same_tables(workers: Any) -> None:
    routing = {"policy": "r_cla", "within_stage": True}
    split = config(parallel={"pipeline": 2}, routing=routing)
    alone = config(parallel={"zero_stage": 0}, routing=routing)
    expected = workers(1)(parity.train, alone, parity.STEPS, "routes_within_two_stages")[0]
    check(workers(2)(parity.train, split)[0], expected)


@pytest.mark.parametrize(("zero", "virtual"), [(1, 1), (2, 2)])
def test_bf16_is_as_close_to_fp32_as_without_a_pipeline(workers: Any, zero: int, virtual: int) -> None:
    expected = one_process(workers, BASE)

    def error(parallel: dict[str, Any], processes: int) -> float:
        found = workers(processes)(parity.train, config(parallel=parallel, train={"precision": "bf16"}))[0]
        return mean_gap(found["gradients"], expected["gradients"])

    split = {"pipeline": 2, "virtual_pipeline": virtual, "zero_stage": zero}
    assert error(split, 2) < 1.2 * error({"zero_stage": 0}, 1)
