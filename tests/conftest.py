"""Shared fixtures."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.runs import write_text
from tests.support.workers import Workers

collect_ignore = ["long"]  # runs when it is named: python -m pytest tests/long


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], Workers]]:
    """``workers(n)``: n processes, started at first use and kept while they are fit."""
    pools: dict[int, Workers] = {}

    def get(size: int) -> Workers:
        if size in pools and pools[size].worn:
            pools.pop(size).close()
        if size not in pools:
            pools[size] = Workers(size)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text to train on."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    return folder
