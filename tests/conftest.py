"""Shared fixtures."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import write_text
from tests.support.workers import Pools

# A shell that starts the tests in the background has them ignore Ctrl-C, and with them all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ["long"]  # runs when it is named: python -m pytest tests/long


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes stay out of a test's name: compressed ones hold the time, and two workers must find the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def workers() -> Iterator[Pools]:
    """``workers(n)(job, ...)`` runs a job on n processes."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text to train on."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    return folder
