"""Initial weights: the same in every layout, each value drawn once over all ranks of a stage."""

from typing import Any

import pytest
import torch

from skv_dist.config.run import RunConfig
from skv_dist.model import initialize
from skv_dist.model.initialize import initial_rows, row_blocks
from tests.support.jobs.initial_values import drawn_elements, largest_at_start
from tests.support.settings import config

WHOLE = 1 << 24


@pytest.mark.parametrize("shape", [(5, 3), (48, 32), (101, 32), (33, 1), (130, 7), (64, 16), (17, 5)], ids=str)
def test_blocks_hold_what_one_draw_gives(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = RunConfig.model_validate(config()).model
    (whole,) = initial_rows("layers.0.mlp.linear_fc2.weight", shape, model, 7)
    monkeypatch.setattr(initialize, "_BLOCK_ELEMENTS", 64)
    pieces = list(initial_rows("layers.0.mlp.linear_fc2.weight", shape, model, 7))
    assert [len(piece) for piece in pieces] == [len(rows) for rows in row_blocks(shape)]
    assert torch.equal(torch.cat(pieces), whole)
    assert len(pieces) > 1 or shape in {(5, 3), (33, 1), (17, 5)}


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor": 2, "sequence_parallel": True},
        {"tensor": 2, "zero_stage": 3},
        {"zero_stage": 1},
        {"zero_stage": 2, "engine": "fsdp"},
        {"pipeline": 2, "tensor": 2},
    ],
    ids=str,
)
def test_every_layout_draws_the_same_values_once(workers: Any, parallel: dict[str, Any]) -> None:
    processes = 4 if parallel == {"tensor": 2, "zero_stage": 3} or "pipeline" in parallel else 2
    ((alone, expected),) = workers(1)(drawn_elements, config(parallel={"zero_stage": 0}), WHOLE)
    answers = workers(processes)(drawn_elements, config(parallel={"zero_stage": 0, **parallel}), 256)
    assert all(digests == expected for _, digests in answers)
    counts = [count for count, _ in answers]
    assert sum(counts) == alone
    assert max(counts) < 1.4 * alone / processes


def test_no_rank_makes_a_tensor_of_a_full_parameter(workers: Any) -> None:
    settings = config(parallel={"tensor": 2, "sequence_parallel": True, "zero_stage": 0})
    for largest, part, full in workers(2)(largest_at_start, settings, 256):
        assert largest <= part < full
