"""Maps measured together, where layers that they agree on run once: the losses are those of each map alone."""

import random
from typing import Any

import numpy as np
import pytest

from skv_dist.routing import map_from_cached_layers
from tests.support.jobs.plans import losses_of_maps
from tests.support.layouts import VARIANTS
from tests.support.settings import config

LAYERS = 8


def drawn_maps(num_maps: int) -> list[tuple[int, ...]]:
    """Nearest owners, any owners, and plain route tables in which sharers lend too, with one of them twice."""
    draw, maps = random.Random(0), []
    for number in range(num_maps):
        owners = sorted({0, *draw.sample(range(LAYERS), draw.randrange(1, LAYERS))})
        table = list(map_from_cached_layers(LAYERS, owners))
        for layer in range(1, LAYERS):
            if number % 3 == 1 and layer not in owners:
                table[layer] = draw.choice([owner for owner in owners if owner < layer])
            if number % 3 == 2:
                table[layer] = draw.randrange(layer + 1)
        maps.append(tuple(table))
    return [*maps, maps[0], tuple(range(LAYERS)), (0,) * LAYERS]


def assert_same(workers: Any, processes: int, settings: dict[str, Any], maps: list[tuple[int, ...]]) -> None:
    for found in workers(processes)(losses_of_maps, settings, maps):
        assert np.array_equal(found["together"], found["alone"])
        assert len(np.unique(found["alone"], axis=0)) == len(set(maps))  # each map matters to this model


@pytest.mark.parametrize(
    "sections",
    [
        {},
        *VARIANTS,
        {"routing": {"policy": "r_cla", "cross_prob": 0.6, "always_own": [0, 3]}},
        {"data": {"reset_attention": True}},
        {"train": {"precision": "bf16"}},
    ],
    ids=lambda sections: "-".join([*sections.get("model", {}), *sections]) or "plain",
)
def test_maps_together_lose_bit_by_bit_what_each_loses_alone(workers: Any, sections: dict[str, Any]) -> None:
    assert_same(workers, 1, config(**sections, parallel={"zero_stage": 0}), drawn_maps(60))


@pytest.mark.parametrize(
    "parallel", [{}, {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}], ids=str
)
def test_so_they_do_over_two_processes(workers: Any, parallel: dict[str, Any]) -> None:
    assert_same(workers, 2, config(parallel={"zero_stage": 0, **parallel}), drawn_maps(20))


def test_layers_run_once_for_all_maps_that_agree_so_far(workers: Any) -> None:
    full = tuple(range(LAYERS))
    without_one = [map_from_cached_layers(LAYERS, set(full) - {layer}) for layer in range(1, LAYERS)]
    (found,) = workers(1)(losses_of_maps, config(parallel={"zero_stage": 0}), [full, *without_one])
    assert found["runs_alone"] == LAYERS * LAYERS
    # The full map runs all layers, and the one without layer l those from l on.
    assert found["runs_together"] == LAYERS + sum(LAYERS - layer for layer in range(1, LAYERS))
