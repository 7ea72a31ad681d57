"""The cells of the parity matrix that up to four processes can hold."""

from typing import Any

import pytest

from tests.long.parity_matrix import POLICIES, cells
from tests.support.compare import compare
from tests.support.settings import config

CELLS = [cell for cell in cells() if cell[0] <= 4]


@pytest.mark.parametrize(("processes", "parallel", "recompute", "policy"), CELLS)
def test_cell_equals_one_process(
    workers: Any, processes: int, parallel: dict[str, Any], recompute: str, policy: str
) -> None:
    train = {"recompute": recompute, "micro_batch_size": 1}
    compare(workers, processes, config(parallel=parallel, train=train, routing=POLICIES[policy]))
