"""Route tables, policies, sharing maps and liveness."""

import hashlib
from typing import Any

import pytest

from skv_dist.config.policy import build_policy, deployment_map
from skv_dist.config.routing import RoutingConfig
from skv_dist.errors import UserError
from skv_dist.routing import (
    RoutePlan,
    map_from_cached_layers,
    map_from_retention,
    validate_sharing_map,
)
from skv_dist.routing.draw import DrawKey
from skv_dist.routing.policies import at_step

POLICIES = [
    RoutingConfig(policy="none"),
    RoutingConfig(policy="r_cla"),
    RoutingConfig(policy="r_cla", window=3),
    RoutingConfig(policy="cla", group_size=3),
    RoutingConfig(policy="rd_cla", group_size=4),
    RoutingConfig(policy="suffix", shared_layers=5),
    RoutingConfig(policy="subset"),
    RoutingConfig(policy="subset", keep_probs="uniform"),
    RoutingConfig(policy="r_cla", always_own=[1, 7]),
    RoutingConfig(policy="nested", order=[0, 11, 4, 7, 1, 2, 3, 5, 6, 8, 9, 10], budgets=[0.5, 0.25, 0.05]),
    RoutingConfig(policy="fixed", kv_source_layers=[0, 0, 0, 3, 3, 3, 0, 0, 8, 8, 8, 8]),
]


@pytest.mark.parametrize("config", POLICIES, ids=lambda c: c.policy)
def test_tables_are_valid_and_reproducible(config: RoutingConfig) -> None:
    policy = build_policy(config, 12)
    for step in range(50):
        key = DrawKey(3, step, step % 5)
        table = policy.table(key)
        assert all(0 <= source <= layer for layer, source in enumerate(table))
        assert table == build_policy(config, 12).table(DrawKey(3, step, step % 5))
        if config.window:
            assert all(layer - source <= config.window for layer, source in enumerate(table))


def test_draws_are_the_same_on_every_platform() -> None:
    """A change of these digests changes every run that resumes."""
    found = []
    for config in (RoutingConfig(policy="r_cla"), RoutingConfig(policy="subset"), RoutingConfig(policy="rd_cla")):
        policy = build_policy(config, 16)
        tables = [policy.table(DrawKey(seed, step, 1)) for seed in (0, 9) for step in range(20)]
        found.append(hashlib.sha256(repr(tables).encode()).hexdigest()[:12])
    assert found == ["a46b124bde2e", "550608592228", "1909dd293dfd"]


def test_coin_and_sources_are_uniform() -> None:
    policy = build_policy(RoutingConfig(policy="r_cla", cross_prob=0.4), 5)
    tables = [policy.table(DrawKey(1, step, 0)) for step in range(20000)]
    crossed = [t[4] for t in tables if t[4] != 4]
    assert abs(len(crossed) / len(tables) - 0.4) < 0.015
    for source in range(4):
        assert abs(crossed.count(source) / len(crossed) - 0.25) < 0.02
    # layers flip coins of their own
    both = sum(t[3] != 3 and t[4] != 4 for t in tables) / len(tables)
    assert abs(both - 0.16) < 0.01


def test_position_changes_the_draw() -> None:
    policy = build_policy(RoutingConfig(policy="r_cla"), 40)
    keys = [DrawKey(1, 1, 1), DrawKey(2, 1, 1), DrawKey(1, 2, 1), DrawKey(1, 1, 2)]
    assert len({policy.table(key) for key in keys}) == 4


def test_schedule() -> None:
    points = [(10, 0.0), (20, 1.0)]
    assert [at_step(points, step) for step in (0, 10, 15, 20, 99)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    policy = build_policy(RoutingConfig(policy="r_cla", cross_prob=points), 4)
    assert policy.table(DrawKey(0, 5, 0)) == (0, 1, 2, 3)
    assert all(source < layer for layer, source in enumerate(policy.table(DrawKey(0, 30, 0))) if layer)


def test_sharing_maps() -> None:
    assert map_from_retention(8, 1.0) == tuple(range(8))
    assert map_from_retention(8, 0.5) == (0, 0, 2, 2, 4, 4, 6, 6)
    assert map_from_retention(8, 0.33) == (0, 0, 0, 3, 3, 3, 6, 6)
    assert map_from_retention(8, 0.25) == (0, 0, 0, 0, 4, 4, 4, 4)
    assert map_from_cached_layers(6, [3, 0, 4]) == (0, 0, 0, 3, 4, 4)
    assert validate_sharing_map([0, 1, 0, 1, 4, 4, 4, 1], 8) == (0, 1, 0, 1, 4, 4, 4, 1)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: map_from_cached_layers(4, [1, 2]), "layer 0"),
        (lambda: map_from_cached_layers(4, [0, 4]), "layer 4"),
        (lambda: map_from_retention(4, 0.0), "retention"),
        (lambda: validate_sharing_map([0, 2, 2], 3), r"kv_source_layers\[1\]"),
        (lambda: validate_sharing_map([0, 0, 1], 3), "keeps no cache of its own"),
        (lambda: validate_sharing_map([0], 3), "1 entries"),
        (lambda: RoutePlan([0, 2, 0]), "layer 1 has source 2"),
        (lambda: build_policy(RoutingConfig(policy="suffix", shared_layers=4), 4), "shared_layers"),
    ],
)
def test_bad_maps_are_refused(make: object, names: str) -> None:
    with pytest.raises(UserError, match=names):
        make()  # type: ignore[operator]


def test_liveness_equals_a_walk_through_the_layers() -> None:
    policy = build_policy(RoutingConfig(policy="r_cla", cross_prob=0.7), 20)
    for step in range(100):
        plan = policy.plan(DrawKey(5, step, 0))
        for layer in range(20):
            still_read = {s for s in plan.table[layer + 1 :] if s <= layer}
            assert plan.live_after(layer) == tuple(sorted(still_read))
            assert plan.readers[layer] == plan.table.count(layer)
        assert plan.live_after(19) == ()


@pytest.mark.parametrize(
    ("table", "trailing"),
    [
        ([0, 1, 2, 3], range(4, 4)),
        ([0, 0, 2, 2], range(3, 4)),
        ([0, 1, 0, 1, 1], range(2, 5)),
        ([0, 0, 0], range(1, 3)),
        ([0, 1, 1, 2], range(3, 4)),  # layer 2 borrows itself, and lends
    ],
    ids=str,
)
def test_trailing_layers_lend_nothing(table: list[int], trailing: range) -> None:
    assert RoutePlan(table).trailing == trailing


def test_routes_within_stages_do_not_cross_and_are_drawn_independently() -> None:
    stages = (range(6), range(6, 12))
    policy = build_policy(RoutingConfig(policy="r_cla", within_stage=True), 12, stages)
    halves = set()
    for step in range(200):
        table = policy.table(DrawKey(1, step, 0))
        assert table[6] == 6
        assert all(source >= 6 for source in table[6:])
        halves.add(tuple(source - 6 for source in table[6:]) == table[:6])
        assert RoutePlan(table).live_at_boundaries(stages) == ((),)
    assert False in halves
    free = build_policy(RoutingConfig(policy="r_cla"), 12, stages)
    assert free == build_policy(RoutingConfig(policy="r_cla"), 12)


def test_what_crosses_a_boundary_is_what_later_stages_read() -> None:
    stages = (range(3), range(3, 5), range(5, 8))
    plan = RoutePlan([0, 1, 0, 1, 4, 4, 0, 7])
    assert plan.live_at_boundaries(stages) == ((0, 1), (0, 4))
    (mean, most), _ = build_policy(RoutingConfig(policy="r_cla", cross_prob=1.0), 8).expected_crossings(stages, 1)
    assert 1 < mean < most <= 3


@pytest.mark.parametrize(
    "given",
    [{"policy": "r_cla"}, {"policy": "subset"}, {"policy": "cla", "group_size": 3}, {"policy": "suffix"}],
    ids=str,
)
def test_every_policy_comes_in_and_goes(given: dict[str, object]) -> None:
    whole = build_policy(RoutingConfig.model_validate(given), 12)
    policy = build_policy(RoutingConfig.model_validate({**given, "start": 10, "ramp": 0.4, "stop": 90}), 12, None, 100)
    dense = tuple(range(12))
    for step in (0, 9, 90, 99):
        assert policy.table(DrawKey(0, step, 0)) == dense
    for step in (50, 89):
        assert policy.table(DrawKey(0, step, 0)) == whole.table(DrawKey(0, step, 0))
    followed = borrowed = 0
    for micro_batch in range(400):
        key = DrawKey(0, 29, micro_batch)  # about half way
        for layer, (source, meant) in enumerate(zip(policy.table(key), whole.table(key))):
            assert source in (layer, meant)
            borrowed += meant != layer
            followed += source != layer
    assert followed / borrowed == pytest.approx(20 / 41, abs=0.07)


def test_parts_are_of_all_steps() -> None:
    policy = build_policy(RoutingConfig(policy="cla", start=0.25, stop=0.75), 4, None, 200)
    shares = [policy.plan(DrawKey(0, step, 0)).retention < 1 for step in range(200)]
    assert shares == [False] * 50 + [True] * 100 + [False] * 50


@pytest.mark.parametrize(
    ("given", "message"),
    [({"start": 2.5}, "whole number of steps"), ({"start": 20, "stop": 20}, r"routing.stop \(step 20\) is not behind")],
)
def test_a_schedule_that_cannot_be_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, UserError), match=message):
        build_policy(RoutingConfig.model_validate({"policy": "cla", **given}), 4, None, 100)


@pytest.mark.parametrize(
    "given", [{"policy": "r_cla"}, {"policy": "cla", "group_size": 4}, {"policy": "rd_cla"}], ids=str
)
def test_some_layers_always_own_and_the_others_do_as_drawn(given: dict[str, object]) -> None:
    free = build_policy(RoutingConfig.model_validate(given), 12)
    policy = build_policy(RoutingConfig.model_validate({**given, "always_own": [1, 6]}), 12)
    for step in range(50):
        drawn, table = free.table(DrawKey(0, step, 0)), policy.table(DrawKey(0, step, 0))
        assert table == tuple(layer if layer in (1, 6) else source for layer, source in enumerate(drawn))


def test_layers_that_always_own_belong_to_every_subset() -> None:
    policy = build_policy(RoutingConfig(policy="subset", keep_probs=[0.0], always_own=[3]), 6)
    assert policy.table(DrawKey(0, 0, 0)) == (0, 0, 0, 3, 3, 3)


def test_layers_that_always_own_are_those_of_the_whole_model() -> None:
    config = RoutingConfig(policy="cla", group_size=3, within_stage=True, always_own=[4])
    assert build_policy(config, 6, (range(3), range(3, 6))).table(DrawKey(0, 0, 0)) == (0, 0, 0, 3, 4, 3)


def test_nested_sets_are_the_deployed_ones() -> None:
    order = [0, 5, 2, 1, 3, 4]
    config = RoutingConfig(policy="nested", order=order, budgets=[1.0, 0.5, 0.01])
    policy = build_policy(config, 6)
    found = {policy.table(DrawKey(0, step, 0)) for step in range(50)}
    assert found == {tuple(range(6)), (0, 0, 2, 2, 2, 5), (0,) * 6}
    assert deployment_map(config, 6, 0.5) == (0, 0, 2, 2, 2, 5)
    assert deployment_map(RoutingConfig(), 6, 0.5) == (0, 0, 2, 2, 4, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "nested"}, "needs an order of the layers: set routing.order"),
        ({"policy": "nested", "order": [1, 0, 2, 3]}, "must begin with layer 0"),
        ({"policy": "nested", "order": [0, 1, 1, 3]}, r"must name each of 0..3 once"),
        ({"policy": "r_cla", "order": [0, 1, 2, 3]}, "read by policy 'nested' only"),
        ({"policy": "r_cla", "always_own": [4]}, "names layer 4, but the layers of the model are 0 to 3"),
        ({"policy": "fixed", "kv_source_layers": [0, 0, 2, 2], "always_own": [1]}, "do not work together"),
    ],
    ids=str,
)
def test_orders_and_owners_that_cannot_be_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, UserError), match=message):
        build_policy(RoutingConfig.model_validate(given), 4)


KINDS = ["sliding", "sliding", "full", "sliding", "sliding", "full", "sliding", "full"]


@pytest.mark.parametrize(
    "given",
    [
        {"policy": "r_cla", "cross_prob": 0.9},
        {"policy": "cla", "group_size": 3},
        {"policy": "rd_cla", "cross_prob": 0.8},
        {"policy": "subset", "keep_probs": [0.2]},
        {"policy": "suffix", "shared_layers": 4},
        {"policy": "nested", "order": [0, 6, 2, 1, 3, 4, 5, 7], "budgets": [0.25, 0.5]},
        {"policy": "r_cla", "cross_prob": 0.9, "within_stage": True},
    ],
    ids=lambda given: str(list(given.values())),
)
def test_layers_of_different_kinds_do_not_share(given: dict[str, Any]) -> None:
    stages = (range(5), range(5, 8))
    policy = build_policy(RoutingConfig.model_validate(given), 8, stages, 0, KINDS)
    tables = [policy.table(DrawKey(1, step, 0)) for step in range(60)]
    assert all(KINDS[layer] == KINDS[source] for table in tables for layer, source in enumerate(table))
    assert any(source != layer for table in tables for layer, source in enumerate(table))
    assert all(source <= layer for table in tables for layer, source in enumerate(table))
    assert all((table[0], table[2]) == (0, 2) for table in tables)  # the first of each kind


def test_maps_know_kinds() -> None:
    assert map_from_retention(8, 0.5, KINDS) == (0, 0, 2, 3, 3, 2, 6, 7)
    assert map_from_cached_layers(8, [0, 2, 4], KINDS) == (0, 0, 2, 0, 4, 2, 4, 2)
    assert deployment_map(RoutingConfig(policy="nested", order=[*range(8)]), 8, 0.1, KINDS) == (0, 0, 2, 0, 0, 2, 0, 2)
    with pytest.raises(UserError, match=r"must contain layer 2: no layer of its kind .full. is before it"):
        map_from_cached_layers(8, [0, 1], KINDS)
    fixed = RoutingConfig(policy="fixed", kv_source_layers=[0, 0, 2, 0, 0, 0, 2, 7])
    with pytest.raises(UserError, match=r"\[5\] is 0, but layer 5 has full .* may be is 0 0 2 0 0 2 0 7"):
        build_policy(fixed, 8, None, 0, KINDS)
