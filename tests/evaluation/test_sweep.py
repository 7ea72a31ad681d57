"""The retention sweep against a plain model, in several layouts."""

from typing import Any

import numpy as np
import pytest
import torch

from skv_dist.config.run import RunConfig
from tests.model.plain import routed_logits
from tests.support.compare import one_process
from tests.support.jobs.evaluation import random_sample, swept_losses
from tests.support.settings import SEQUENCE, VOCAB, config

SAMPLES = 7  # of eight that whole micro-batches hold
TABLES = {
    "all": (0, 1, 2, 3, 4, 5, 6, 7),
    "half": (0, 0, 2, 2, 4, 4, 6, 6),
    "one": (0,) * 8,
    "arbitrary": (0, 1, 0, 1, 4, 4, 4, 1),
}


def settings(**parallel: Any) -> dict[str, Any]:
    # Initial weights so large that it matters much which K/V are read.
    return config(model={"init_std": 0.3}, eval={"samples": SAMPLES}, parallel={"zero_stage": 0, **parallel})


@pytest.fixture(scope="module")
def weights(workers: Any) -> dict[str, np.ndarray]:
    return one_process(workers, settings(), steps=0)["parameters"]


def plain_losses(weights: dict[str, np.ndarray]) -> dict[str, float]:
    run = RunConfig.model_validate(settings())
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in weights.items()}
    tokens = torch.tensor(np.stack([random_sample(i, SEQUENCE, VOCAB).tokens for i in range(SAMPLES)]))
    losses = {}
    for name, table in TABLES.items():
        logits = routed_logits(tensors, run.model, tokens[:, :-1], table)  # [b, s, v]
        losses[name] = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    return losses


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [
        (1, {}),
        (2, {}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (4, {"pipeline": 2, "tensor": 2, "sequence_parallel": True}),
    ],
    ids=str,
)
def test_losses_equal_a_plain_model_in_every_layout(
    workers: Any, weights: dict[str, np.ndarray], processes: int, parallel: dict[str, Any]
) -> None:
    expected = plain_losses(weights)
    assert len({round(loss, 2) for loss in expected.values()}) == len(TABLES)  # another map is another loss
    for losses in workers(processes)(swept_losses, settings(**parallel), weights, TABLES):
        assert losses == pytest.approx(expected, rel=1e-5)


def test_retentions_stand_for_maps(workers: Any, weights: dict[str, np.ndarray]) -> None:
    given = {**settings(), "eval": {"samples": SAMPLES, "retention": [1.0, 0.5, 0.125]}}
    losses = workers(1)(swept_losses, given, weights, {})[0]
    expected = plain_losses(weights)
    assert losses == pytest.approx(
        {"loss@1.00": expected["all"], "loss@0.50": expected["half"], "loss@0.12": expected["one"]}, rel=1e-5
    )
