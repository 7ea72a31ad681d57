"""The fuzz tests with a hundred times as many examples, and other ones in each run."""

import os
import subprocess
import sys


def test_more_examples() -> None:
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/fuzz"], env={**os.environ, "SKV_FUZZ": "100"}, check=True
    )
