"""Every layout against one process that holds everything: losses, norms, parameters and every gradient."""

import json
import shutil
from typing import Any

import numpy as np
import pytest

from tests import jobs

TOLERANCE = 1e-5


def worst(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, str]:
    """Largest error of any tensor relative to its largest entry, and whose it is."""
    assert found.keys() == expected.keys()
    errors = [
        (float(np.abs(found[name] - expected[name]).max() / (np.abs(expected[name]).max() + 1e-12)), name)
        for name in expected
    ]
    return max(errors)


def check(found: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=tolerance)
    np.testing.assert_allclose(found["norms"], expected["norms"], rtol=tolerance)
    for what in ("gradients", "parameters"):
        error, name = worst(found[what], expected[what])
        # Adam divides by the root of its second moment: it magnifies rounding where a gradient is nearly zero.
        limit = tolerance if what == "gradients" else 20 * tolerance
        assert error <= limit, f"{what}: {name} is off by {error:.2e}"


_expected: dict[str, Any] = {}


def one_process(workers: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The same run in a single process (ZeRO 0, no recompute, not compiled)."""
    train = {**settings["train"], "recompute": "none", "compile": False}
    alone = {**settings, "parallel": {"zero_stage": 0}, "train": train}
    key = json.dumps(alone, sort_keys=True)
    if key not in _expected:
        _expected[key] = workers(1)(jobs.train, alone)[0]
    return _expected[key]


def compare(workers: Any, processes: int, settings: dict[str, Any]) -> None:
    """A run spread over ``processes`` equals the same in one."""
    check(workers(processes)(jobs.train, settings)[0], one_process(workers, settings))


# processes, tensor, sequence_parallel
SPLITS = [(1, 1, False), (2, 1, False), (2, 2, False), (2, 2, True)]
LAYOUTS = [
    *(
        (*split, zero, recompute, policy)
        for split in SPLITS
        for zero in range(4)
        for recompute in ("none", "selective", "full")
        for policy in ("r_cla", "none")
        if (policy, recompute) != ("none", "selective")
    ),
    *((4, 2, True, zero, "full", "r_cla") for zero in range(4)),
    *((4, 4, zero % 2 == 0, zero, "none", "r_cla") for zero in range(4)),  # more ranks than KV heads
    (2, 2, True, 1, "none", "suffix"),
    (2, 1, False, 3, "full", "subset"),
    (4, 4, False, 0, "selective", "cla"),
]


@pytest.mark.parametrize(("processes", "tensor", "sp", "zero", "recompute", "policy"), LAYOUTS)
def test_layout_equals_one_process(
    workers: Any, processes: int, tensor: int, sp: bool, zero: int, recompute: str, policy: str
) -> None:
    settings = jobs.config(
        parallel={"tensor": tensor, "sequence_parallel": sp, "zero_stage": zero},
        train={"recompute": recompute, "recompute_modules": ["core_attn", "mlp"]},
        routing={"policy": policy, "shared_layers": 3},
    )
    compare(workers, processes, settings)


@pytest.mark.parametrize("zero", [2, 3])
def test_reducing_beside_the_backward_pass_equals_one_process(workers: Any, zero: int) -> None:
    compare(workers, 2, jobs.config(parallel={"zero_stage": zero, "overlap_comm": True}))


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
    compare(workers, 2, jobs.config(parallel=parallel, train={"recompute": "full"}, **variant))


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}], ids=str)
def test_recompute_repeats_the_dropout(workers: Any, parallel: dict[str, Any]) -> None:
    def run(recompute: str) -> dict[str, Any]:
        settings = jobs.config(
            parallel={"zero_stage": 0, **parallel},
            model={"attention_dropout": 0.2, "hidden_dropout": 0.1},
            train={"recompute": recompute, "recompute_modules": ["core_attn", "mlp"]},
        )
        return workers(parallel.get("tensor", 1))(jobs.train, settings)[0]

    expected = run("none")
    assert expected["losses"] != one_process(workers, jobs.BASE)["losses"]
    for recompute in ("selective", "full"):
        check(run(recompute), expected, 1e-6)


# processes, layout, micro-batch (of a global batch of 8: as gradients came, or summed over micro-batches), recompute
COMPILED: list[tuple[int, dict[str, Any], int, str]] = [
    (1, {}, 2, "none"),
    (1, {}, jobs.GLOBAL_BATCH, "selective"),
    (2, {"zero_stage": 2}, 2, "none"),
    (2, {"zero_stage": 3}, 2, "full"),
    (2, {"pipeline": 2, "virtual_pipeline": 2}, 2, "full"),
    (2, {"tensor": 2, "sequence_parallel": True}, 2, "selective"),
    (4, {"tensor": 4}, 2, "none"),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@needs_compiler
@pytest.mark.parametrize(("processes", "parallel", "micro_batch", "recompute"), COMPILED, ids=str)
def test_compiled_equals_one_process(
    workers: Any, processes: int, parallel: dict[str, Any], micro_batch: int, recompute: str
) -> None:
    train = {"compile": True, "micro_batch_size": micro_batch, "recompute": recompute}
    compare(workers, processes, jobs.config(parallel={"zero_stage": 1, **parallel}, train=train))


@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v)))
def test_compiled_model_variants_equal_one_process(workers: Any, variant: dict[str, dict[str, Any]]) -> None:
    compare(workers, 1, jobs.config(train={"compile": True}, **variant))
