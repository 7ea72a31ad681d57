"""Parallel layouts that a few processes hold, and a selection of them that stands for all."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tests.support.settings import config

# Over a pipeline a model has two layers a chunk, or one; without one the lower half shows as much in half the time.
SMALL = {"num_layers": 4}
VARIANTS: list[dict[str, dict[str, Any]]] = [
    {"model": {"norm": "layernorm", "activation": "gelu", "qk_norm": False, "tie_embeddings": True}},
    {
        "model": {"block": "gemma4", "activation": "geglu", "qk_norm": True, "tie_embeddings": True},
        "optimizer": {"lr": 1e-3},  # with the others' it runs away, and rounding with it
    },
    {"data": {"reset_attention": True}},
    {
        "model": {
            "block": "gemma",
            "activation": "geglu",
            "score_cap": 3.0,
            "logit_cap": 5.0,
            "sliding_layers": [0, 1],
            "sliding_window": 5,
        },
        "optimizer": {"lr": 1e-3},
    },
    {"model": {"block": "olmo2", "biases": ["attention_output"], "residual_scale": 0.5}},
    {
        "model": {
            "qk_norm": False,
            "biases": ["qkv", "attention_output", "mlp"],
            "no_rope_layers": [3],
            "sliding_layers": [0, 2],
            "sliding_window": 5,
            "sliding_rope_theta": 500.0,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "embedding_scale": 4.0,
            "residual_scale": 0.3,
            "score_scale": 0.5,
            "logit_divisor": 3.0,
        }
    },
]


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
    engine: str = "deepspeed"

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.replicas

    @property
    def parallel(self) -> dict[str, Any]:
        """The section of the configuration. The number of replicas follows from that of processes."""
        keys = ("tensor", "sequence_parallel", "pipeline", "virtual_pipeline", "engine", "zero_stage")
        return {key: getattr(self, key) for key in keys}

    def settings(self, **sections: dict[str, Any]) -> dict[str, Any]:
        """Of a training, with keys of some sections replaced."""
        model = {} if self.pipeline > 1 else SMALL
        own: dict[str, dict[str, Any]] = {
            "parallel": self.parallel,
            "train": {"recompute": self.recompute, "recompute_modules": ["core_attn", "mlp"]},
            "routing": {"policy": self.policy, "shared_layers": 3},
            "model": {"tie_embeddings": self.tie_embeddings, **model},
        }
        return config(**{name: {**own.get(name, {}), **sections.get(name, {})} for name in {**own, **sections}})

    def __str__(self) -> str:
        """``TP2-SP-PP2-ZeRO1-full-r_cla``."""
        sizes = {"TP": self.tensor, "PP": self.pipeline, "VPP": self.virtual_pipeline, "DP": self.replicas}
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        if self.sequence_parallel:
            parts.insert(1, "SP")
        parts += [("FSDP" if self.engine == "fsdp" else "ZeRO") + str(self.zero_stage), self.recompute, self.policy]
        return "-".join([*parts, "tied"] if self.tie_embeddings else parts)


def every_layout(most_processes: int = 4, engine: str = "deepspeed") -> Iterator[Layout]:
    """The whole product for one engine, few processes first; for ``fsdp`` those in which it is the engine."""
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
            layout = Layout(*split, zero_stage, recompute, policy, tied, engine)
            if engine == "fsdp":
                supported = zero_stage > 0 and layout.replicas > 1
            else:
                supported = zero_stage < 3 or layout.pipeline == 1
            if supported:
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
