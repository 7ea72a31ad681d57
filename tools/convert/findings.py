"""What a comparison of an exported model with its checkpoint gave, and whether that is good enough."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .blocks import Map

TOLERANCE = 1e-4  # largest difference of a log-probability, float32


@dataclass(frozen=True)
class Finding:
    """What was measured under one map.

    Attributes:
        prefill, stepwise: largest difference of a log-probability from the checkpoint's, the text given at once, and
            token by token.
        wrong_map: the same difference from the checkpoint under another map: it must be large.
        cache_bytes, unshared_bytes: per token, measured in the engine; of a model that shares nothing.
        how: what the bytes are of, in words.
    """

    engine: str
    sources: Map
    prefill: float
    stepwise: float
    wrong_map: float
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
        if not max(self.prefill, self.stepwise) <= TOLERANCE:
            return f"log-probabilities differ by {max(self.prefill, self.stepwise):.1e} (limit {TOLERANCE:g})"
        if not self.wrong_map > 10 * TOLERANCE:
            return f"the comparison does not tell maps apart (another map differs by {self.wrong_map:.1e} only)"
        if abs(self.ratio - self.expected_ratio) > 0.02:
            return f"the cache holds {self.ratio:.3f} of an unshared one instead of {self.expected_ratio:.3f}"
        return None


def first_problem(findings: Iterable[Finding]) -> str | None:
    return next((problem for finding in findings if (problem := finding.problem())), None)


def table(findings: Sequence[Finding]) -> str:
    """The findings in Markdown."""
    rows = [
        "| engine | layers with a cache | max Δ log p, prefill | token by token | under a wrong map "
        "| cache bytes/token | unshared | ratio | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for f in findings:
        rows.append(
            f"| {f.engine} | {len(set(f.sources))} of {len(f.sources)} | {f.prefill:.1e} | {f.stepwise:.1e} | "
            f"{f.wrong_map:.1e} | {f.cache_bytes:,.0f} | {f.unshared_bytes:,.0f} | {f.ratio:.3f} | "
            f"{f.problem() or 'ok'} |"
        )
    return "\n".join(rows)
