"""Every layout against one process that holds everything: losses, norms, parameters and every gradient."""

from typing import Any

import numpy as np
import pytest

from tests import jobs

TOLERANCE = 1e-5


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
    for what in ("gradients", "parameters"):
        error, name = worst(found[what], expected[what])
        # Adam divides by the root of its second moment: it magnifies rounding where a gradient is nearly zero.
        limit = tolerance if what == "gradients" else 20 * tolerance
        assert error <= limit, f"{what}: {name} is off by {error:.2e}"


_expected: dict[str, Any] = {}


def reference(workers: Any, routing: dict[str, Any]) -> dict[str, Any]:
    """The single-process run (ZeRO 0, no recompute)."""
    settings = jobs.config(parallel={"zero_stage": 0})
    settings["routing"] = routing
    key = repr(routing)
    if key not in _expected:
        _expected[key] = workers(1)(jobs.train, settings)[0]
    return _expected[key]


# processes, tensor, sequence_parallel, zero_stage, recompute, policy
LAYOUTS = [
    (1, 1, False, 1, "none", "r_cla"),
    (1, 1, False, 2, "selective", "r_cla"),
    (1, 1, False, 3, "full", "r_cla"),
    (1, 1, False, 0, "full", "r_cla"),
    (1, 1, False, 0, "selective", "r_cla"),
    (2, 1, False, 0, "none", "r_cla"),
    (2, 1, False, 1, "full", "r_cla"),
    (2, 1, False, 2, "none", "r_cla"),
    (2, 1, False, 2, "full", "r_cla"),
    (2, 1, False, 3, "none", "none"),
    (2, 2, False, 0, "none", "r_cla"),
    (2, 2, False, 1, "full", "r_cla"),
    (2, 2, True, 0, "full", "r_cla"),
    (2, 2, True, 2, "selective", "r_cla"),
    (2, 2, True, 1, "none", "none"),
    (2, 1, False, 3, "full", "none"),
    (2, 2, False, 2, "none", "suffix"),
    (4, 2, True, 0, "none", "r_cla"),
    (4, 2, True, 1, "full", "subset"),
    (4, 2, True, 2, "full", "r_cla"),
    (4, 4, True, 1, "full", "r_cla"),  # more ranks than KV heads
    (4, 4, False, 0, "selective", "cla"),
]


@pytest.mark.parametrize(("processes", "tensor", "sp", "zero", "recompute", "policy"), LAYOUTS)
def test_layout_equals_one_process(
    workers: Any, processes: int, tensor: int, sp: bool, zero: int, recompute: str, policy: str
) -> None:
    routing = {"policy": policy, **({"shared_layers": 3} if policy == "suffix" else {})}
    settings = jobs.config(
        parallel={"tensor": tensor, "sequence_parallel": sp, "zero_stage": zero},
        train={"recompute": recompute, "recompute_modules": ["core_attn", "mlp"]},
    )
    settings["routing"] = routing
    found = workers(processes)(jobs.train, settings)[0]
    check(found, reference(workers, routing))
