"""Policies: each maps the position of a micro-batch to a route table (docs/method.md, "The family of policies")."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from skv_dist.routing.draw import DrawKey, below, happens, words
from skv_dist.routing.kinds import Kinds
from skv_dist.routing.plan import RoutePlan
from skv_dist.routing.sharing import map_from_cached_layers, map_from_first_of_order

Schedule = float | Sequence[tuple[int, float]]


def at_step(schedule: Schedule, step: int) -> float:
    """Value of a constant, or of (step, value) points joined by straight lines and held flat outside them."""
    if isinstance(schedule, (int, float)):
        return float(schedule)
    if step <= schedule[0][0]:
        return schedule[0][1]
    for (step_a, value_a), (step_b, value_b) in zip(schedule, schedule[1:]):
        if step < step_b:
            return value_a + (value_b - value_a) * (step - step_a) / (step_b - step_a)
    return schedule[-1][1]


@dataclass(frozen=True)
class Policy(ABC):
    """Base of all policies. ``table`` is a pure function of ``key``: the same wherever and whenever it is called."""

    num_layers: int

    @abstractmethod
    def table(self, key: DrawKey) -> tuple[int, ...]:
        """``table[l]``: the layer whose own K/V layer l attends to."""

    def plan(self, key: DrawKey) -> RoutePlan:
        return RoutePlan(self.table(key))

    def expected_crossings(self, stages: Sequence[range], seed: int, draws: int = 256) -> list[tuple[float, int]]:
        """Mean and largest number of sources that cross each pipeline boundary, over ``draws`` micro-batches of step 0.

        Args:
            stages: the layers of each pipeline stage, in the order of execution.
        """
        counts_by_draw = [
            [len(live) for live in self.plan(DrawKey(seed, 0, micro_batch)).live_at_boundaries(stages)]
            for micro_batch in range(draws)
        ]
        return [(sum(counts) / draws, max(counts)) for counts in zip(*counts_by_draw)]


@dataclass(frozen=True)
class Fixed(Policy):
    """The same table in every micro-batch: ``none``, ``cla``, ``suffix`` and ``fixed``."""

    sources: tuple[int, ...]

    def table(self, key: DrawKey) -> tuple[int, ...]:
        return self.sources


@dataclass(frozen=True)
class RandomCLA(Policy):
    """R-CLA (arXiv 2604.22782): by coin, a source drawn uniformly from all earlier layers.

    ``window`` limits the distance to the source; None means all earlier layers, as in the paper.
    """

    cross_prob: Schedule
    window: int | None = None

    def table(self, key: DrawKey) -> tuple[int, ...]:
        probability = at_step(self.cross_prob, key.step)
        drawn = words(key, b"r_cla", 2 * self.num_layers)
        sources = [0]
        for layer in range(1, self.num_layers):
            if happens(drawn[2 * layer], probability):
                reach = layer if self.window is None else min(layer, self.window)
                sources.append(layer - reach + below(drawn[2 * layer + 1], reach))
            else:
                sources.append(layer)
        return tuple(sources)


@dataclass(frozen=True)
class RandomFixedTarget(Policy):
    """RD-CLA: the fixed target of CLA, applied by coin (an ablation of arXiv 2604.22782)."""

    targets: tuple[int, ...]
    cross_prob: Schedule

    def table(self, key: DrawKey) -> tuple[int, ...]:
        probability = at_step(self.cross_prob, key.step)
        drawn = words(key, b"rd_cla", self.num_layers)
        return tuple(
            target if happens(word, probability) else layer
            for layer, (target, word) in enumerate(zip(self.targets, drawn))
        )


@dataclass(frozen=True)
class RandomSubset(Policy):
    """Draw the cached set, then apply the deployment rule: training distribution = deployment distribution.

    Each layer but the first and those ``always_kept`` is kept with probability q; q is drawn per micro-batch, from
    ``keep_probs`` or, where that is None, uniformly from [0, 1].
    """

    keep_probs: tuple[float, ...] | None
    always_kept: tuple[int, ...] = ()

    def table(self, key: DrawKey) -> tuple[int, ...]:
        drawn = words(key, b"subset", self.num_layers + 1)
        if self.keep_probs is None:
            keep = drawn[-1] / 2**64
        else:
            keep = self.keep_probs[below(drawn[-1], len(self.keep_probs))]
        cached = [0, *(layer for layer in range(1, self.num_layers) if happens(drawn[layer], keep))]
        return map_from_cached_layers(self.num_layers, sorted({*cached, *self.always_kept}))


@dataclass(frozen=True)
class Nested(Policy):
    """Sets of which each holds all smaller ones: the first layers of an order, under the deployment rule.

    Attributes:
        order: all layers, those that keep their cache longest first.
        sizes: how many layers keep it; one of these is drawn per micro-batch.
        kinds: of the layers, where there are several; the first of each keeps its cache as well.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    kinds: Kinds | None = None

    def table(self, key: DrawKey) -> tuple[int, ...]:
        (word,) = words(key, b"nested", 1)
        return map_from_first_of_order(self.order, self.sizes[below(word, len(self.sizes))], self.kinds)


@dataclass(frozen=True)
class AlwaysOwn(Policy):
    """Another policy, but for some layers, which use their own K/V. What the policy draws for the others stays."""

    policy: Policy
    owners: frozenset[int]

    def table(self, key: DrawKey) -> tuple[int, ...]:
        drawn = enumerate(self.policy.table(key))
        return tuple(layer if layer in self.owners else source for layer, source in drawn)


@dataclass(frozen=True)
class Ramped(Policy):
    """Another policy, from some step on: until then each layer uses its own K/V, and in between it follows that policy
    with a probability that grows along a straight line.

    Attributes:
        begin: step at which the first layers may borrow.
        full: step from which all follow the policy.
        end: step from which each layer uses its own K/V again; None: never.
    """

    policy: Policy
    begin: int
    full: int
    end: int | None

    def table(self, key: DrawKey) -> tuple[int, ...]:
        followed = self._part_followed(key.step)
        table = self.policy.table(key) if followed else range(self.num_layers)
        drawn = words(key, b"ramp", self.num_layers)
        return tuple(
            source if happens(word, followed) else layer for layer, (source, word) in enumerate(zip(table, drawn))
        )

    def _part_followed(self, step: int) -> float:
        if step < self.begin or (self.end is not None and step >= self.end):
            return 0.0
        return 1.0 if step >= self.full else (step - self.begin + 1) / (self.full - self.begin + 1)

    def expected_crossings(self, stages: Sequence[range], seed: int, draws: int = 256) -> list[tuple[float, int]]:
        """At full strength."""
        return self.policy.expected_crossings(stages, seed, draws)


@dataclass(frozen=True)
class WithinParts(Policy):
    """A policy of its own for each of some parts of the layers, so that no K/V goes from one to another: layers of one
    kind, which alone understand each other's, or layers of one pipeline stage. The latter **changes the method**:
    sources are no longer uniform over all earlier layers, and the first layer of each stage never borrows.

    Attributes:
        parts: policies over so many layers, which they number from 0.
        layers: the numbers of each part's layers in the model, in ascending order.
    """

    parts: tuple[Policy, ...]
    layers: tuple[tuple[int, ...], ...]

    def table(self, key: DrawKey) -> tuple[int, ...]:
        sources = [0] * self.num_layers
        for number, (part, layers) in enumerate(zip(self.parts, self.layers)):
            for layer, source in zip(layers, part.table(replace(key, part=number))):
                sources[layer] = layers[source]
        return tuple(sources)
