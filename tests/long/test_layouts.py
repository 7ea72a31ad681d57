"""Every layout that up to four processes hold; the short suite runs a selection of them."""

from typing import Any

import pytest

from tests.support.compare import compare
from tests.support.layouts import Layout, every_layout


@pytest.mark.parametrize("layout", every_layout(), ids=str)
def test_layout_equals_one_process(workers: Any, layout: Layout) -> None:
    compare(workers, layout.processes, layout.settings())
