"""What a comparison of an exported model with its checkpoint gave, and whether that is good enough."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .blocks import Map

# Largest differences of a log-probability. A right export of a real model (30 layers, activations in the thousands)
# differs by 2e-12 where both sides compute in float64, and by up to 1e-3 in float32, in which small errors would hide.
FLOAT64_LIMIT, FLOAT32_LIMIT = 1e-7, 1e-4


def float32_limit(noise: float) -> float:
    """For an engine that computes in float32.

    Args:
        noise: largest difference between the model's log-probabilities in float32 and in float64. An engine adds up in
            another order, and so rounds differently, but by as much.
    """
    return max(FLOAT32_LIMIT, 10 * noise)


def float16_limit(noise: float) -> float:
    """For an engine that computes in float16, or rounds to it between operations.

    Args:
        noise: as for `float32_limit`, in float16. It is thousands of times as large, so that a limit of ten times as
            much would let another map pass.
    """
    return max(FLOAT32_LIMIT, 3 * noise)


@dataclass(frozen=True)
class Finding:
    """What was measured under one map.

    Attributes:
        prefill, stepwise: largest difference of a log-probability from the checkpoint's, the text given at once, and
            token by token.
        limit: what both may be.
        wrong_map: the same difference from the checkpoint under another map: it must be large. None where the folder
            can run no other.
        cache_bytes, unshared_bytes: per token, measured in the engine; of a model that shares nothing.
        how: what the bytes are of, in words.
    """

    engine: str
    sources: Map
    prefill: float
    stepwise: float
    limit: float
    wrong_map: float | None
    cache_bytes: float
    unshared_bytes: float
    how: str

    @property
    def ratio(self) -> float:
        return self.cache_bytes / self.unshared_bytes

    @property
    def expected_ratio(self) -> float:
        return len(set(self.sources)) / len(self.sources)

    def problem(self) -> str | None:
        """In one clause what is wrong; None where nothing is."""
        worst = float(np.max([self.prefill, self.stepwise]))  # NaN where either is
        if not worst <= self.limit:
            return f"log-probabilities differ by {worst:.1e} (limit {self.limit:.1e})"
        if self.wrong_map is not None and not self.wrong_map > 10 * self.limit:
            return f"the comparison does not tell maps apart (another map differs by {self.wrong_map:.1e} only)"
        if abs(self.ratio - self.expected_ratio) > 0.02:
            return f"the cache holds {self.ratio:.3f} of an unshared one instead of {self.expected_ratio:.3f}"
        return None


def first_problem(findings: Iterable[Finding]) -> str | None:
    return next((problem for finding in findings if (problem := finding.problem())), None)


def table(findings: Sequence[Finding]) -> str:
    """The findings in Markdown."""
    rows = [
        "| engine | layers with a cache | max Δ log p, prefill | token by token | limit | under a wrong map "
        "| cache bytes/token | unshared | ratio | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for f in findings:
        wrong_map = "none possible" if f.wrong_map is None else f"{f.wrong_map:.1e}"
        rows.append(
            f"| {f.engine} | {len(set(f.sources))} of {len(f.sources)} | {f.prefill:.1e} | {f.stepwise:.1e} | "
            f"{f.limit:.1e} | {wrong_map} | {f.cache_bytes:,.0f} | {f.unshared_bytes:,.0f} | {f.ratio:.3f} | "
            f"{f.problem() or 'ok'} |"
        )
    return "\n".join(rows)
