"""A run that is spread over processes against the same run in one."""

import json
import shutil
from typing import Any

import numpy as np
import pytest

from tests.support.jobs import parity

TOLERANCE = 1e-5
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


def worst(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, str]:
    """Largest error of any tensor relative to its largest entry, and whose it is."""
    assert found.keys() == expected.keys()
    errors = [
        (float(np.abs(found[name] - expected[name]).max() / (np.abs(expected[name]).max() + 1e-12)), name)
        for name in expected
    ]
    return max(errors)


def check(found: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=tolerance)
    np.testing.assert_allclose(found["norms"], expected["norms"], rtol=tolerance)
    for tensors in ("gradients", "parameters"):
        error, name = worst(found[tensors], expected[tensors])
        # Adam divides by the root of its second moment: it magnifies rounding where a gradient is nearly zero.
        limit = tolerance if tensors == "gradients" else 20 * tolerance
        assert error <= limit, f"{tensors}: {name} is off by {error:.2e}"


_references: dict[str, Any] = {}


def one_process(workers: Any, settings: dict[str, Any], steps: int = parity.STEPS) -> dict[str, Any]:
    """The same run in a single process (ZeRO 0, no recompute, not compiled), made once a session."""
    train = {**settings["train"], "recompute": "none", "compile": False}
    alone = {**settings, "parallel": {"zero_stage": 0}, "train": train}
    key = json.dumps([alone, steps], sort_keys=True)
    if key not in _references:
        _references[key] = workers(1)(parity.train, alone, steps)[0]
    return _references[key]


def compare(workers: Any, processes: int, settings: dict[str, Any]) -> None:
    """A run spread over ``processes`` equals the same in one."""
    check(workers(processes)(parity.train, settings)[0], one_process(workers, settings))


def mean_gap(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Mean over all gradients of the distance to the expected one, relative to its length.

    Gradients of zero are left out: those of k-norms of layers whose K/V nobody read.
    """
    lengths = {name: np.linalg.norm(value) for name, value in expected.items()}
    return float(np.mean([np.linalg.norm(found[name] - expected[name]) / n for name, n in lengths.items() if n > 0]))
