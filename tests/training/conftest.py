"""Text to train on."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for number in range(40):
        words = rng.choice(["the", "cache", "of", "any", "layer", "may", "be", "cut\n"], 60)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder
