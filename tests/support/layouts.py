"""Parallel layouts that a few processes hold, and a selection of them that stands for all."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tests.support.settings import config


class Layout(NamedTuple):
    """How a model is spread over processes, and what it trains with."""

    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    virtual_pipeline: int = 1
    replicas: int = 1
    zero_stage: int = 0
    recompute: str = "none"
    policy: str = "r_cla"
    tie_embeddings: bool = False

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.replicas

    @property
    def parallel(self) -> dict[str, Any]:
        """The section of the configuration. The number of replicas follows from that of processes."""
        keys = ("tensor", "sequence_parallel", "pipeline", "virtual_pipeline", "zero_stage")
        return {key: getattr(self, key) for key in keys}

    def settings(self, **train: Any) -> dict[str, Any]:
        return config(
            parallel=self.parallel,
            train={"recompute": self.recompute, "recompute_modules": ["core_attn", "mlp"], **train},
            routing={"policy": self.policy, "shared_layers": 3},
            # Over a pipeline two layers a chunk, or one; without one the lower half shows as much in half the time.
            model={"tie_embeddings": self.tie_embeddings, "num_layers": 8 if self.pipeline > 1 else 4},
        )

    def __str__(self) -> str:
        """``TP2-SP-PP2-ZeRO1-full-r_cla``."""
        sizes = {"TP": self.tensor, "PP": self.pipeline, "VPP": self.virtual_pipeline, "DP": self.replicas}
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        if self.sequence_parallel:
            parts.insert(1, "SP")
        parts += [f"ZeRO{self.zero_stage}", self.recompute, self.policy]
        return "-".join([*parts, "tied"] if self.tie_embeddings else parts)


def every_layout(most_processes: int = 4) -> Iterator[Layout]:
    """The whole product, few processes first."""
    splits = [
        (tensor * pipeline * replicas, tensor, sp, pipeline, virtual, replicas)
        for tensor, sp in ((1, False), (2, False), (2, True), (4, False), (4, True))
        for pipeline, virtual in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2))
        for replicas in (1, 2, 4)
    ]
    for processes, *split in sorted(splits):
        if processes > most_processes:
            break
        for zero_stage, recompute, policy, tied in itertools.product(
            range(4), ("none", "selective", "full"), ("r_cla", "none", "suffix", "cla", "subset"), (False, True)
        ):
            layout = Layout(*split, zero_stage, recompute, policy, tied)
            if zero_stage < 3 or layout.pipeline == 1:
                yield layout


def _pairs(layout: Layout) -> set[Any]:
    """What a layout must show: each pair of its values, and its split into processes under its ZeRO stage."""
    return {*itertools.combinations(enumerate(layout), 2), layout[: Layout._fields.index("recompute")]}


def _triples(layout: Layout) -> set[Any]:
    return set(itertools.combinations(enumerate(layout), 3))


def covering(layouts: Iterable[Layout], chosen: Sequence[Layout] = ()) -> list[Layout]:
    """``chosen``, and more layouts until every pair that any of ``layouts`` shows is shown by one of them.

    A fault where two values do not go together is met; one that needs three at once may show up in the whole product
    only (`tests/long`). The next layout is always one with the most pairs that are missing, of these the first with the
    most triples.
    """
    shown = {layout: (_pairs(layout), _triples(layout)) for layout in layouts}
    pairs = set().union(*(pairs for pairs, _ in shown.values()))
    triples = set().union(*(triples for _, triples in shown.values()))
    selection: list[Layout] = []

    def choose(layout: Layout) -> None:
        selection.append(layout)
        pairs.difference_update(_pairs(layout))
        triples.difference_update(_triples(layout))

    for layout in chosen:
        choose(layout)
    while pairs:
        choose(max(shown, key=lambda layout: (len(shown[layout][0] & pairs), len(shown[layout][1] & triples))))
    return selection
