"""`skv-eval search` on the checkpoint of a run, and what takes its file."""

import json
from pathlib import Path
from typing import Any

import pytest
from skv_tools.convert.searched import found_map

from skv_dist.checkpoint import folder as files
from skv_dist.config.routing import RoutingConfig
from skv_dist.errors import UserError
from skv_dist.routing.found import read_found
from tests.support.jobs.loop import run_training
from tests.support.processes import Command, free_port, places
from tests.support.runs import EVALUATE
from tests.support.settings import run_settings


@pytest.fixture(scope="module")
def checkpoint(workers: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a dense run: its layers are worth something each."""
    out = tmp_path_factory.mktemp("searched") / "run"
    settings = run_settings(text, out, routing={"policy": "none"}, train={"steps": 3}, checkpoint={"every": 3})
    workers(1)(run_training, settings)
    return files.folder_of(out / "checkpoints", 3)


def search(folder: Path, checkpoint: Path, *given: object, processes: int = 1) -> tuple[str, Any]:
    """What the first process printed, and the file."""
    folder.mkdir(exist_ok=True)
    port, file = free_port(), folder / "layers.json"
    line = ["search", str(checkpoint), "--budgets", "0.5", "0.25", "--samples", "4", "--json", str(file)]
    commands = [
        Command(EVALUATE, [*line, *map(str, given)], places(rank, processes, port), folder / f"{rank}.log")
        for rank in range(processes)
    ]
    for command in commands:
        assert command.wait() == 0, command.printed
    return commands[0].printed, json.loads(file.read_text())


@pytest.fixture(scope="module")
def found(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return search(tmp_path_factory.mktemp("found"), checkpoint)


def test_the_file_says_what_was_found(found: tuple[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    printed, content = found
    assert sorted(content["order"]) == list(range(8))
    assert content["order"][0] == 0
    assert [len(entry["layers"]) for entry in content["budgets"]] == [4, 2]
    assert "order, the most needed first" in printed
    assert f"{content['maps_measured']} maps measured, {content['maps_measured_on_all']} of them on all" in printed
    assert 0 < content["maps_measured_on_all"] <= content["maps_measured"]
    assert "trained without routing" in printed  # what half of the cache costs such a model
    for entry in content["budgets"]:
        assert entry["rise"] == pytest.approx(entry["loss"] - content["full"]["loss"], abs=1e-9)
    # The loss of a set is the one that skv-eval measures on the sequences behind those of the search.
    layers = content["budgets"][0]["layers"]
    line = [str(checkpoint), "eval.samples=8", "--cached-layers", *map(str, layers), "--json", str(tmp_path / "all")]
    command = Command(EVALUATE, line, {}, tmp_path / "log")
    assert command.wait() == 0, command.printed
    both = json.loads((tmp_path / "all").read_text())[f"loss@layers {','.join(map(str, layers))}"]
    line[1], line[-1] = "eval.samples=4", str(tmp_path / "half")
    command = Command(EVALUATE, line, {}, tmp_path / "log")
    assert command.wait() == 0, command.printed
    first = json.loads((tmp_path / "half").read_text())[f"loss@layers {','.join(map(str, layers))}"]
    assert content["budgets"][0]["loss"] == pytest.approx(2 * both - first, rel=1e-6)


def test_other_text_is_searched_on(found: tuple[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    """Loss and cost are those that skv-eval measures on the same file, on the sequences behind those of the search."""
    rows = [json.dumps({"text": f"{number} times {number} is {number * number}. " * 4}) for number in range(60)]
    (tmp_path / "other.jsonl").write_text("\n".join(rows))
    _, content = search(tmp_path / "found", checkpoint, "--data", tmp_path / "other.jsonl")
    entry = content["budgets"][0]
    losses = []
    for samples in (4, 8):
        line = [str(checkpoint), "--data", str(tmp_path / "other.jsonl"), "--samples", str(samples), "--retention", "1"]
        line += ["--cached-layers", *map(str, entry["layers"]), "--json", str(tmp_path / "losses.json")]
        command = Command(EVALUATE, line, {}, tmp_path / "log")
        assert command.wait() == 0, command.printed
        losses.append(list(json.loads((tmp_path / "losses.json").read_text()).values()))
    full, cut = (2 * both - first for first, both in zip(*losses, strict=True))
    assert content["full"]["loss"] == pytest.approx(full, rel=1e-6)
    assert entry["loss"] == pytest.approx(cut, rel=1e-6)
    assert content["full"]["loss"] != pytest.approx(found[1]["full"]["loss"], rel=1e-2)


def test_the_front_is_drawn(found: tuple[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from skv_dist.evaluation.search.front import check_plottable, plot_front

    check_plottable(tmp_path / "front.svg")
    plot_front(found[1], 8, tmp_path / "front.svg")
    drawn = (tmp_path / "front.svg").read_text()
    assert "<svg" in drawn
    with pytest.raises(UserError, match=r"front\.doc: a figure is one of"):
        check_plottable(tmp_path / "front.doc")
    with pytest.raises(UserError, match="is no folder"):
        check_plottable(tmp_path / "none" / "front.png")


def test_layouts_find_the_same(found: tuple[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    """Replicas share out the sequences; stages pass the rows on."""
    _, one = found
    for name, layout in (("replicas", ()), ("stages", ("parallel.pipeline=2",))):
        _, other = search(tmp_path / name, checkpoint, *layout, processes=2)
        assert other["order"] == one["order"]
        for mine, theirs in zip(other["budgets"], one["budgets"]):
            assert mine["kv_source_layers"] == theirs["kv_source_layers"]
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_exports_and_training_take_the_file(found: tuple[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    _, content = found
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(content))
    table, words = found_map(file, 0.5, checkpoint, 8)
    assert table == tuple(content["budgets"][0]["kv_source_layers"])
    assert "for 0.5 of the cache" in words
    routing = RoutingConfig.model_validate({"policy": "nested", "order_from": str(file)})
    assert routing.order == content["order"]
    assert routing.order_from is None  # a checkpoint's configuration needs no file


def test_what_does_not_fit_is_refused(found: tuple[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    _, content = found
    file = tmp_path / "layers.json"

    def refusal(**changed: Any) -> str:
        file.write_text(json.dumps({**content, **changed}))
        with pytest.raises(UserError) as caught:
            found_map(file, 0.75 if not changed else 0.5, checkpoint, 8)
        assert str(file) in str(caught.value)
        return str(caught.value)

    assert "holds nothing for a budget of 0.75: choose one of 0.5, 0.25" in refusal()
    assert "was searched on another checkpoint" in refusal(fingerprint="0" * 64)
    assert "has format 'skv-search/0'" in refusal(format="skv-search/0")
    (entry, *_) = content["budgets"]
    for wrong in ({**entry, "rise": None}, {**entry, "kv_source_layers": [1] * 8}, {**entry, "budget": "half"}, 5):
        assert refusal(budgets=[wrong])
    assert refusal(order=[0, 0, 1, 2, 3, 4, 5, 6])
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is no JSON: it is nested too deeply"):
        read_found(file)
    file.write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        read_found(file)
    with pytest.raises(UserError, match="cannot read"):
        read_found(tmp_path / "gone.json")
