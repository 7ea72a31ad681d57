"""Frozen weights: they stay, the others learn as in one process, and nothing is kept for them."""

from typing import Any

import numpy as np
import pytest

from tests.support.compare import compare, one_process
from tests.support.jobs import parity
from tests.support.layouts import SMALL
from tests.support.settings import config
from tests.support.workers import JobFailedError

PATTERNS = ["*.mlp.*", "embedding.weight", "layers.2.*norm.weight"]


def settings(recompute: str = "none", tied: bool = True, precision: str = "fp32", **parallel: Any) -> dict[str, Any]:
    return config(
        model={**SMALL, "tie_embeddings": tied},
        train={"freeze": PATTERNS, "recompute": recompute, "precision": precision},
        parallel={"zero_stage": 0, **parallel},
    )


def test_frozen_weights_stay_and_the_others_learn(workers: Any) -> None:
    trained, initial = one_process(workers, settings()), one_process(workers, settings(), steps=0)
    stayed = {n for n, value in trained["parameters"].items() if np.array_equal(value, initial["parameters"][n])}
    assert stayed == {n for n in trained["parameters"] if ".mlp." in n or n == "embedding.weight"} | {
        f"layers.2.{norm}.weight" for norm in ("input_layernorm", "pre_mlp_layernorm")
    } | {f"layers.2.self_attention.{norm}.weight" for norm in ("q_layernorm", "k_layernorm")}
    # Gradients of the others are those of a run in which nothing is frozen.
    free = one_process(workers, {**settings(), "train": {**settings()["train"], "freeze": []}})
    for name in set(trained["gradients"]) - stayed:
        np.testing.assert_allclose(trained["gradients"][name], free["gradients"][name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("processes", "changed"),
    [
        (1, {"recompute": "full"}),
        (2, {"tensor": 2, "sequence_parallel": True}),
        (2, {"pipeline": 2}),
        (2, {"pipeline": 2, "tied": False, "recompute": "full"}),
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3}),
        (4, {"tensor": 2, "zero_stage": 3, "recompute": "full"}),
        (2, {"engine": "fsdp", "zero_stage": 1}),
        (4, {"engine": "fsdp", "zero_stage": 3, "pipeline": 2, "recompute": "full"}),
    ],
    ids=str,
)
def test_layouts_equal_one_process(workers: Any, processes: int, changed: dict[str, Any]) -> None:
    compare(workers, processes, settings(**changed))


@pytest.mark.parametrize(
    ("patterns", "processes", "parallel", "message"),
    [
        (["*.mpl.*"], 1, {}, r"no weight is called '\*.mpl.\*'; there are, among others, embedding.weight"),
        (["*"], 1, {}, "leaves nothing to train on pipeline rank 0"),
        (["layers.*", "embedding.weight"], 2, {"pipeline": 2}, "leaves nothing to train on pipeline rank 0"),
    ],
)
def test_what_cannot_be_frozen_is_refused(
    workers: Any, patterns: list[str], processes: int, parallel: dict[str, Any], message: str
) -> None:
    given = config(model=SMALL, train={"freeze": patterns}, parallel={"zero_stage": 0, **parallel})
    with pytest.raises(JobFailedError, match=message):
        workers(processes)(parity.train, given)
