"""Every layout against one process that holds everything: losses, norms, parameters and every gradient."""

import itertools
from typing import Any

import pytest

from tests.support.compare import check, compare, needs_compiler
from tests.support.faults import FAULTS, FSDP, FSDP_FAULTS
from tests.support.jobs import parity
from tests.support.layouts import SMALL, VARIANTS, Layout, covering, every_layout
from tests.support.settings import GLOBAL_BATCH, config

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
# The other engine changes where parameters are and when gradients are reduced: each split, and each stage with it.
FSDP_LAYOUTS = [
    *dict.fromkeys(layout for _, layout in FSDP_FAULTS),  # right without their fault
    FSDP._replace(zero_stage=2, recompute="selective"),
    FSDP._replace(pipeline=2, virtual_pipeline=2, zero_stage=3),
    FSDP._replace(pipeline=2, zero_stage=2, recompute="full", policy="subset"),
    FSDP._replace(pipeline=2, virtual_pipeline=2, recompute="full", tie_embeddings=True),
    FSDP._replace(pipeline=2, virtual_pipeline=2, zero_stage=2, policy="suffix"),
    FSDP._replace(tensor=2, sequence_parallel=True, zero_stage=2, recompute="selective", tie_embeddings=True),
]


def test_the_selection_shows_every_value_and_pair() -> None:
    for one, other in itertools.combinations(range(len(Layout._fields)), 2):
        pairs = {(layout[one], layout[other]) for layout in LAYOUTS}
        assert pairs >= {(layout[one], layout[other]) for layout in CANDIDATES}
    assert {layout[:6] for layout in LAYOUTS} >= {layout[:6] for layout in CANDIDATES}  # splits under ZeRO stages


@pytest.mark.parametrize("layout", [*LAYOUTS, *FSDP_LAYOUTS], ids=str)
def test_layout_equals_one_process(workers: Any, layout: Layout) -> None:
    compare(workers, layout.processes, layout.settings())


@pytest.mark.parametrize("zero", [2, 3])
def test_reducing_beside_the_backward_pass_equals_one_process(workers: Any, zero: int) -> None:
    compare(workers, 2, config(model=SMALL, parallel={"zero_stage": zero, "overlap_comm": True}))


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        (FSDP._replace(tensor=2, zero_stage=2), {"num_kv_heads": 1}),  # fewer KV heads than tensor ranks
        (FSDP._replace(replicas=4, zero_stage=3), {"hidden_size": 40}),  # rows that the replicas do not divide
    ],
    ids=str,
)
def test_other_sizes_equal_one_process(workers: Any, layout: Layout, model: dict[str, int]) -> None:
    compare(workers, layout.processes, layout.settings(model=model))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v)))
def test_model_variants_equal_one_process(workers: Any, variant: dict[str, dict[str, Any]]) -> None:
    split = Layout(tensor=2, sequence_parallel=True, zero_stage=3, recompute="full")
    compare(workers, 2, split.settings(**variant))


@pytest.mark.parametrize("variant", VARIANTS[-3:], ids=["gemma", "olmo2", "options"])
def test_families_over_stages_equal_one_process(workers: Any, variant: dict[str, dict[str, Any]]) -> None:
    compare(workers, 2, Layout(pipeline=2, zero_stage=1, recompute="selective").settings(**variant))


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}], ids=str)
def test_recompute_repeats_the_dropout(workers: Any, parallel: dict[str, Any]) -> None:
    def run(recompute: str, dropout: float = 0.2) -> dict[str, Any]:
        settings = config(
            parallel={"zero_stage": 0, **parallel},
            model={**SMALL, "attention_dropout": dropout, "hidden_dropout": dropout / 2},
            train={"recompute": recompute, "recompute_modules": ["core_attn", "mlp"]},
        )
        return workers(parallel.get("tensor", 1))(parity.train, settings)[0]

    expected = run("none")
    assert expected["losses"] != run("none", 0.0)["losses"]
    for recompute in ("selective", "full"):
        check(run(recompute), expected, 1e-6)


# micro-batch: of a global batch of 8, so that gradients are used as they came, or summed over micro-batches
COMPILED: list[tuple[Layout, int]] = [
    (Layout(), 2),
    (Layout(recompute="selective"), GLOBAL_BATCH),
    (Layout(replicas=2, zero_stage=3, recompute="full"), 2),
    (FSDP._replace(zero_stage=3, recompute="selective"), 2),
    (Layout(pipeline=2, recompute="full"), 2),
    (Layout(tensor=2, sequence_parallel=True, recompute="selective"), 2),
]


@needs_compiler
@pytest.mark.parametrize(("layout", "micro_batch"), COMPILED, ids=str)
def test_compiled_equals_one_process(workers: Any, layout: Layout, micro_batch: int) -> None:
    compare(workers, layout.processes, layout.settings(train={"compile": True, "micro_batch_size": micro_batch}))


@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS[1:], ids=lambda v: next(iter(v)))
def test_compiled_model_variants_equal_one_process(workers: Any, variant: dict[str, dict[str, Any]]) -> None:
    compare(workers, 1, Layout().settings(**variant, train={"compile": True}))


@needs_compiler
def test_compiled_with_fewer_kv_heads_than_ranks_equals_one_process(workers: Any) -> None:
    compare(workers, 2, Layout(tensor=2).settings(model={"num_kv_heads": 1}, train={"compile": True}))
