"""Adapters: gradients against those of whole weights, and in every layout."""

from typing import Any

import numpy as np
import pytest
import torch
from skv_tools.convert.names import entries, fuse, split

from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from tests.support.compare import check, needs_compiler
from tests.support.jobs import adapters, parity
from tests.support.layouts import SMALL
from tests.support.settings import config

RANK, ALPHA = 3, 5.0


def settings(
    rank: int = RANK, recompute: str = "none", compiled: bool = False, targets: list[str] | None = None, **parallel: Any
) -> dict[str, Any]:
    lora = {"rank": rank, "alpha": ALPHA, **({} if targets is None else {"target_modules": targets})}
    return config(
        model={**SMALL, "tie_embeddings": True},
        train={"recompute": recompute, "compile": compiled},
        parallel={"zero_stage": 0, **parallel},
        lora=lora,
    )


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj", "down_proj"]], ids=["all", "some"])
def test_gradients_are_those_of_the_sum(workers: Any, targets: list[str] | None) -> None:
    """By the chain rule from the gradients of a model without adapters whose weights are the sums, taken apart and put
    together again by the converter's own names."""
    found = workers(1)(adapters.gradients, settings(targets=targets))[0]
    model = RunConfig.model_validate(settings()).model
    weights, scale = found["weights"], ALPHA / RANK
    sums: dict[str, np.ndarray] = {}
    products: dict[str, tuple[str, str, Any, int]] = {}  # their name -> names of A and B, entry, place in it
    for entry in entries(model):
        if entry.ours is None:
            continue
        parts = [part.clone() for part in split(entry, torch.from_numpy(weights[entry.ours]), model)]
        for place, theirs in enumerate(entry.theirs):
            a, b = (
                f"{entry.ours.removesuffix('.weight')}.{matrix}.{theirs.split('.')[-2].removesuffix('_proj')}"
                for matrix in ("lora_A", "lora_B")
            )
            if a in weights:
                parts[place] += scale * torch.from_numpy(weights[b] @ weights[a])
                products[theirs] = (a, b, entry, place)
        sums[entry.ours] = fuse(entry, parts, model).numpy()
    assert found["states"] == sum(".lora_" in name for name in weights)  # nothing is kept for what stays
    assert len(products) == model.num_layers * (7 if targets is None else 3) - (0 if model.gated or targets else 4)
    whole = workers(1)(adapters.gradients, settings(rank=0), sums)[0]
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    for a, b, entry, place in products.values():
        gradient = split(entry, torch.from_numpy(whole["gradients"][entry.ours]), model)[place].numpy()
        for name, expected in (
            (a, scale * weights[b].T @ gradient),
            (b, scale * gradient @ weights[a].T),
        ):
            np.testing.assert_allclose(found["gradients"][name], expected, atol=2e-6, err_msg=name)
    for name in sums:
        np.testing.assert_array_equal(found["gradients"][name], weights[name], err_msg=name)  # never updated


@pytest.fixture(scope="module")
def alone(workers: Any) -> Any:
    """The same run in one process."""
    return workers(1)(parity.train, settings(), parity.STEPS, "adapters_drawn")[0]


@pytest.mark.parametrize(
    ("processes", "changed"),
    [
        (1, {"recompute": "full"}),
        pytest.param(1, {"compiled": True}, marks=needs_compiler),
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence_parallel": True, "recompute": "selective"}),
        (2, {"pipeline": 2}),
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 2}),
        (4, {"tensor": 2, "pipeline": 2}),
        (2, {"engine": "fsdp", "zero_stage": 3, "recompute": "full"}),
        (4, {"engine": "fsdp", "zero_stage": 1}),  # more replicas than rows
        (4, {"engine": "fsdp", "zero_stage": 3, "tensor": 2, "sequence_parallel": True}),
    ],
    ids=str,
)
def test_layouts_equal_one_process(workers: Any, alone: Any, processes: int, changed: dict[str, Any]) -> None:
    check(workers(processes)(parity.train, settings(**changed), parity.STEPS, "adapters_drawn")[0], alone)


def test_layers_share_what_is_compiled(workers: Any) -> None:
    """Dynamo compiles once more for each class that it has not seen, and gives up after some."""
    assert workers(1)(adapters.kinds_of_layers, settings())[0] == 1


@pytest.mark.parametrize("fault", ["adapters_not_summed", "adapters_unscaled"])
def test_faults_are_noticed(workers: Any, alone: Any, fault: str) -> None:
    with pytest.raises(AssertionError):
        check(workers(2)(parity.train, settings(tensor=2), parity.STEPS, fault)[0], alone)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"zero_stage": 3}, "lora.rank 3 and parallel.zero_stage 3 do not work together"),
        ({"tensor": 4}, "parallel.tensor 4 do not work together where model.num_kv_heads is 2"),
    ],
)
def test_what_does_not_go_together_is_refused(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunConfig.model_validate(settings(**parallel))


def test_the_order_of_target_modules_says_nothing() -> None:
    one, other = (
        RunConfig.model_validate(settings(targets=names)) for names in (["v_proj", "q_proj"], ["q_proj", "v_proj"])
    )
    assert one.lora == other.lora
