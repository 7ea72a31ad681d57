"""The search for layers: against all sets where there are few, and its rules."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skv_dist.errors import UserError
from skv_dist.evaluation.search.constraints import Constraints
from skv_dist.evaluation.search.eliminate import backward_order
from skv_dist.evaluation.search.groups import cheapest_cuts, group_costs
from skv_dist.evaluation.search.measured import Measured, Table
from skv_dist.evaluation.search.progress import Progress
from skv_dist.evaluation.search.refine import swapped, with_free_sources
from skv_dist.evaluation.search.search import Result, search, sizes

LAYERS = 8
NO_CONSTRAINTS = Constraints.of(LAYERS, [], None, 1)


PARTS = (slice(4), slice(4, 8), slice(8, 16))


def model_of(
    measure: Callable[[Table], np.ndarray], layers: int = LAYERS, count: float = 100.0, **given: Any
) -> Measured:
    """``measure`` gives the losses of 16 sequences, which are asked for in three parts."""
    counts = [np.full(16, count)[part] for part in PARTS]
    return Measured(layers, lambda tables, part: [measure(table)[PARTS[part]] for table in tables], counts, **given)


def measured(seed: int = 0, noise: float = 0.0, interaction: float = 1.0) -> Measured:
    """A made model: each layer has its price for using another's K/V, which grows with the distance, and neighbours
    that both share cost more than their sum. ``noise`` differs by sequence and map.
    """
    draw = np.random.default_rng(seed)
    price = draw.gamma(1.0, 0.1, LAYERS)
    pairs = interaction * draw.gamma(1.0, 0.02, LAYERS)
    hard = draw.normal(2, 0.5, 16)

    def measure(table: Table) -> np.ndarray:
        loss = 0.0
        for layer, source in enumerate(table):
            if source != layer:
                loss += price[layer] * (layer - source) ** 0.5
                loss += pairs[layer] if table[layer - 1] != layer - 1 else 0.0
        shaken = np.random.default_rng([seed, *table]).normal(0, noise, 16) if noise else 0.0
        return 100 * (hard + loss + shaken)

    return model_of(measure)


def best_of_all(model: Measured, size: int, allowed: Callable[[tuple[int, ...]], bool] = lambda _: True) -> float:
    sets = (s for s in itertools.combinations(range(LAYERS), size) if s[0] == 0 and allowed(s))
    return min(model.loss_of(each) for each in sets)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("budget", [0.25, 0.5, 0.75])
def test_finds_the_best_of_all_sets(seed: int, budget: float) -> None:
    model = measured(seed)
    (found,) = search(model, [budget], NO_CONSTRAINTS).found
    assert model.loss_of(found.layers) == pytest.approx(best_of_all(measured(seed), round(budget * LAYERS)), abs=1e-9)


def test_cuts_are_the_best_where_costs_add_up() -> None:
    model = measured(3, interaction=0.0)
    cuts = cheapest_cuts(group_costs(model, NO_CONSTRAINTS, worst=100.0), LAYERS)
    assert sorted(cuts) == list(range(1, LAYERS + 1))
    for size, layers in cuts.items():
        assert len(layers) == size
        assert model.loss_of(layers) == pytest.approx(best_of_all(measured(3, interaction=0.0), size), abs=1e-9)


def test_the_order_is_that_of_backward_elimination_on_all_sequences_with_fewer_measurements() -> None:
    for seed in range(10):
        model, plain = measured(seed), measured(seed)
        order, fewest = backward_order(model, NO_CONSTRAINTS)
        kept, removed = set(range(LAYERS)), []
        while len(kept) > 1:
            removed.append(min(kept - {0}, key=lambda layer: plain.loss_of(kept - {layer})))
            kept.remove(removed[-1])
        assert order == (0, *reversed(removed))
        assert fewest == 1
        assert model.num_measured(3) < plain.num_measured(3)


def test_a_swap_within_the_noise_is_not_taken() -> None:
    quiet, shaken = measured(1), measured(1, noise=50.0)
    layers = (0, *sorted(range(1, LAYERS), key=lambda layer: quiet.loss_of({0, layer}))[-3:])
    worst = quiet.table_of(layers)
    assert quiet.loss(swapped(quiet, NO_CONSTRAINTS, worst)) < quiet.loss(worst)
    kept = swapped(shaken, NO_CONSTRAINTS, worst)
    gained = shaken.difference(kept, worst)
    assert kept == worst or -gained.mean > gained.error


def test_a_race_measures_on_until_the_best_map_is_sure() -> None:
    """The best one is behind at first, by what its error allows; one is out behind the first part."""
    draw = np.random.default_rng(0)
    clear, near, best = (0, 0, 0), (0, 0, 2), (0, 1, 1)
    sums = {clear: 3 + draw.normal(0, 0.1, 16), near: np.ones(16), best: 1 + draw.normal(0, 0.5, 16)}
    sums[best][:4] += 0.2 - (sums[best][:4] - 1).mean()
    sums[best][4:] -= 0.4
    asked: list[Table] = []

    def measure(table: Table) -> np.ndarray:
        asked.append(table)
        return sums[table]

    model = model_of(measure, 3, count=1.0)
    assert model.best(sums) == best
    assert [asked.count(table) for table in (clear, near, best)] == [1, 3, 3]
    assert (model.num_measured(), model.num_measured(3)) == (3, 2)
    assert model.best([clear]) == clear
    assert model.loss(clear) == pytest.approx(sums[clear].mean())  # of all sequences, whatever the race measured


def test_a_difference_has_the_error_of_its_pairs() -> None:
    sums = {(0, 1): np.array([1.0, 2.0, 3.0, 6.0]), (0, 0): np.array([2.0, 2.0, 5.0, 7.0])}
    pair = Measured(2, lambda tables, _: [sums[table] for table in tables], [np.ones(4)])
    gaps = sums[0, 0] - sums[0, 1]
    mean, error = pair.difference((0, 0), (0, 1))
    assert mean == pytest.approx(gaps.mean())
    assert error == pytest.approx(gaps.std(ddof=1) / 2)


def test_sharers_take_the_owner_that_suits_them() -> None:
    def measure(table: Table) -> np.ndarray:
        return np.full(16, 10.0 * (table[3] != 0) + (table[5] != 4))

    model = model_of(measure, 6)
    assert with_free_sources(model, Constraints.of(6), (0, 0, 2, 2, 4, 4)) == (0, 0, 2, 0, 4, 4)


@pytest.mark.parametrize(
    "constraints",
    [Constraints.of(LAYERS, keep=[5, 6]), Constraints.of(LAYERS, apart=3), Constraints.of(LAYERS, stages=2)],
    ids=["keep", "apart", "stages"],
)
def test_what_must_hold_holds(constraints: Constraints) -> None:
    for seed in range(5):
        model = measured(seed)
        result = search(model, [0.5, 0.75], constraints)
        for found in result.found:
            assert constraints.allow(found.layers)
            best = best_of_all(measured(seed), len(found.layers), constraints.allow)
            assert model.loss_of(found.layers) == pytest.approx(best, abs=1e-9)
        for size in range(result.fewest, LAYERS + 1):
            assert constraints.allow(result.order[:size])


@pytest.mark.parametrize("kinds", [None, ("window", "full") * 4], ids=["one kind", "two kinds"])
@pytest.mark.parametrize("given", [{"apart": 2}, {"stages": 2}], ids=["apart", "stages"])
def test_no_map_does_what_constraints_rule_out(given: dict[str, int], kinds: tuple[str, ...] | None) -> None:
    """Nor where layers of another kind lie between, or sharers choose among owners."""
    constraints = Constraints.of(LAYERS, kinds=kinds, **given)
    reads_first = model_of(lambda table: 100.0 * np.full(16, -table.count(0) - table.count(1)), kinds=kinds)
    for model in (model_of(lambda table: 100.0 * np.full(16, len(set(table))), kinds=kinds), reads_first):
        for found in search(model, [0.5, 0.75], constraints, free_sources=True).found:
            assert max(map(found.table.count, found.layers)) <= given.get("apart", LAYERS)
            stage = LAYERS // given.get("stages", 1)
            assert all(layer // stage == source // stage for layer, source in enumerate(found.table))


@pytest.mark.parametrize(
    ("budgets", "given", "message"),
    [
        ([1.5], {}, r"must lie in \(0, 1\]"),
        ([0.05], {}, "0.05 keeps less than one of 8 layers: ask for 0.125 or more"),
        ([0.25], {"keep": [3, 5]}, "keeps 2 of 8 layers, but --keep, --apart and --stages need 3"),
        ([0.25], {"apart": 2}, "need 4"),
        ([0.5], {"keep": [8]}, "--keep names layer 8"),
        ([0.5], {"stages": 3}, "--stages 3 does not divide the 8 layers"),
        ([0.5], {"apart": 0}, "--apart must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(budgets: list[float], given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sizes(budgets, Constraints.of(LAYERS, **given))  # type: ignore[arg-type]


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    whole = measured(noise=0.02)
    expected = search(whole, [0.5, 0.25], NO_CONSTRAINTS)
    calls: list[tuple[Table, int]] = []

    def attempt(limit: int) -> Result:
        progress = Progress(tmp_path / "layers.json.partial", "this one")
        known = progress.begin()

        def measure(tables: Sequence[Table], part: int) -> list[np.ndarray]:
            found = []
            for table in tables:
                if len(calls) == limit:
                    raise KeyboardInterrupt
                calls.append((table, part))
                found.append(measured(noise=0.02).sums(table)[PARTS[part]])
                progress.note("search", table, found[-1])
            return found

        counts = [np.full(16, 100.0)[part] for part in PARTS]
        model = Measured(LAYERS, measure, counts, known.get("search"))
        result = search(model, [0.5, 0.25], NO_CONSTRAINTS)
        progress.end()
        return result

    for limit in (10, 40):
        with pytest.raises(KeyboardInterrupt):
            attempt(limit)
    with (tmp_path / "layers.json.partial").open("a") as file:
        file.write('{"stage": "search", "map": [0, 0')  # killed while it wrote
    assert Progress(tmp_path / "layers.json.partial", "another").read() == {}
    assert attempt(10_000) == expected
    assert len(calls) == len(set(calls)) == sum(whole.num_measured(parts) for parts in (1, 2, 3))
    assert not list(tmp_path.iterdir())


def test_maps_come_in_rounds_of_neighbours_each_once() -> None:
    rounds: list[list[Table]] = []

    def measure(tables: Sequence[Table], _: int) -> list[np.ndarray]:
        rounds.append(list(tables))
        return [np.full(4, float(sum(table))) for table in tables]

    model = Measured(7, measure, [np.ones(4)])
    tables = [model.table_of({0, *rest}) for rest in itertools.product(range(7), repeat=3)]
    model.prepare(reversed(tables))
    model.prepare(tables)
    assert [len(part) for part in rounds] == [16, 16, 10]  # an interruption loses one
    assert list(itertools.chain(*rounds)) == sorted(set(tables))
    assert model.loss(tables[7]) == sum(tables[7])


def test_a_full_disk_does_not_end_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(tmp_path / "layers.json.partial", "this one")
    progress.begin()
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115 (closing it would fail)
    progress._stream = full
    progress.note("search", (0, 0), np.zeros(2))
    progress.note("search", (0, 1), np.zeros(2))
    assert capsys.readouterr().out.count("cannot be written: No space left on device; going on without") == 1
