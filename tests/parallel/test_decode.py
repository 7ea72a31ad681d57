"""Decoding runs trailing layers that borrow over the last position of a prompt alone, and nothing else changes."""

from typing import Any

import numpy as np
import pytest

from tests.support.compare import one_process
from tests.support.jobs.evaluation import prefilled
from tests.support.settings import config

LAYERS = 8
MAPS = {
    "two trail": [0, 0, 2, 2, 2, 5, 5, 0],
    "a stage trails": [0, 1, 0, 3, 1, 3, 3, 0],
    "more than a stage trails": [0, 1, 0, 1, 1, 0, 1, 0],
    "all but the first": [0] * LAYERS,
    "none trails": [0, 0, 2, 2, 4, 4, 6, 7],
}
PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5, 4, 3, 2, 30, 31, 32], [17]]
LONGEST, NEW = 11, 5


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor": 2},
    {"tensor": 2, "sequence_parallel": True},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
]


def settings(**parallel: Any) -> dict[str, Any]:
    return config(model={"init_std": 0.3}, data={"sequence_length": 32}, parallel={"zero_stage": 0, **parallel})


@pytest.fixture(scope="module")
def weights(workers: Any) -> dict[str, np.ndarray]:
    return one_process(workers, settings(), steps=0)["parameters"]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_trailing_layers_run_over_the_last_position(
    workers: Any, weights: dict[str, np.ndarray], name: str, parallel: dict[str, Any]
) -> None:
    table, stages = MAPS[name], parallel.get("pipeline", 1)
    size = stages * parallel.get("tensor", 1)
    skipping, whole = (
        workers(size)(prefilled, settings(**parallel), weights, table, PROMPTS, NEW, skips) for skips in (True, False)
    )
    for rank, (answers, logits, rows) in enumerate(skipping):
        assert len(rows) == LAYERS // stages
        assert rows == {layer: LONGEST if layer <= max(table) else 1 for layer in rows}
        assert whole[rank][2] == dict.fromkeys(rows, LONGEST)
        assert answers == whole[rank][0]
        assert len(logits) == (NEW if rank == size - 1 or stages == 1 else 0)
        np.testing.assert_allclose(logits, whole[rank][1], atol=1e-5, rtol=0)
