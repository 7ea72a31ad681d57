"""A run that several tests look into."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import whole_run
from tests.support.layouts import Layout


@pytest.fixture(scope="session")
def finished(workers: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two replicas with its checkpoints. Not to be changed."""
    out = tmp_path_factory.mktemp("finished")
    whole_run(workers, text, out, Layout(replicas=2, zero_stage=1))
    return out
