"""Every layout against one process that holds everything: losses, norms, parameters and every gradient."""

from typing import Any

import pytest

from tests.support.compare import check, compare, needs_compiler, one_process
from tests.support.faults import FAULTS
from tests.support.jobs import parity
from tests.support.layouts import Layout, covering, every_layout
from tests.support.settings import BASE, GLOBAL_BATCH, config

CHOSEN = [
    *dict.fromkeys(layout for _, layout in FAULTS),  # right without their fault
    Layout(tensor=4),  # more ranks than KV heads
    Layout(tensor=4, sequence_parallel=True, zero_stage=3, recompute="full"),
    Layout(tensor=2, replicas=2, zero_stage=3),  # hung once: gathers followed the route
]
# Not again: over four tensor-parallel ranks, which cost most by far, and ZeRO 1 and 2 with one replica, where there is
# nothing to shard and they are ZeRO 0.
CANDIDATES = [
    layout for layout in every_layout() if layout.tensor < 4 and (layout.replicas > 1 or layout.zero_stage in (0, 3))
]
LAYOUTS = covering(CANDIDATES, CHOSEN)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_equals_one_process(workers: Any, layout: Layout) -> None:
    compare(workers, layout.processes, layout.settings())


@pytest.mark.parametrize("zero", [2, 3])
def test_reducing_beside_the_backward_pass_equals_one_process(workers: Any, zero: int) -> None:
    compare(workers, 2, config(parallel={"zero_stage": zero, "overlap_comm": True}))


VARIANTS: list[dict[str, dict[str, Any]]] = [
    {"model": {"norm": "layernorm", "activation": "gelu", "qk_norm": False, "tie_embeddings": True}},
    {
        "model": {"block": "gemma4", "activation": "geglu", "qk_norm": True, "tie_embeddings": True},
        "optimizer": {"lr": 1e-3},  # with the others' it runs away, and rounding with it
    },
    {"data": {"reset_attention": True}},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v)))
@pytest.mark.parametrize("zero", [1, 3])
def test_model_variants_equal_one_process(workers: Any, variant: dict[str, dict[str, Any]], zero: int) -> None:
    parallel = {"zero_stage": zero, "tensor": 2, "sequence_parallel": True}
    compare(workers, 2, config(parallel=parallel, train={"recompute": "full"}, **variant))


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}], ids=str)
def test_recompute_repeats_the_dropout(workers: Any, parallel: dict[str, Any]) -> None:
    def run(recompute: str) -> dict[str, Any]:
        settings = config(
            parallel={"zero_stage": 0, **parallel},
            model={"attention_dropout": 0.2, "hidden_dropout": 0.1},
            train={"recompute": recompute, "recompute_modules": ["core_attn", "mlp"]},
        )
        return workers(parallel.get("tensor", 1))(parity.train, settings)[0]

    expected = run("none")
    assert expected["losses"] != one_process(workers, BASE)["losses"]
    for recompute in ("selective", "full"):
        check(run(recompute), expected, 1e-6)


# processes, layout, micro-batch (of a global batch of 8: as gradients came, or summed over micro-batches), recompute
COMPILED: list[tuple[int, dict[str, Any], int, str]] = [
    (1, {}, 2, "none"),
    (1, {}, GLOBAL_BATCH, "selective"),
    (2, {"zero_stage": 2}, 2, "none"),
    (2, {"zero_stage": 3}, 2, "full"),
    (2, {"pipeline": 2, "virtual_pipeline": 2}, 2, "full"),
    (2, {"tensor": 2, "sequence_parallel": True}, 2, "selective"),
    (4, {"tensor": 4}, 2, "none"),
]


@needs_compiler
@pytest.mark.parametrize(("processes", "parallel", "micro_batch", "recompute"), COMPILED, ids=str)
def test_compiled_equals_one_process(
    workers: Any, processes: int, parallel: dict[str, Any], micro_batch: int, recompute: str
) -> None:
    train = {"compile": True, "micro_batch_size": micro_batch, "recompute": recompute}
    compare(workers, processes, config(parallel={"zero_stage": 1, **parallel}, train=train))


@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v)))
def test_compiled_model_variants_equal_one_process(workers: Any, variant: dict[str, dict[str, Any]]) -> None:
    compare(workers, 1, config(train={"compile": True}, **variant))
