"""Losses and epochs by data source, and the time, in metrics.jsonl."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skv_dist.config.data import DataConfig
from skv_dist.data.batches import MicroBatch, collate
from skv_dist.data.open import open_data
from skv_dist.data.order import blended, num_blended
from skv_dist.data.tokenizer import ByteTokenizer
from skv_dist.parallel import run_batch
from skv_dist.training.callbacks import Console
from tests.support.jobs.loop import run_training, run_with_sources_shifted
from tests.support.processes import Command
from tests.support.runs import EVALUATE
from tests.support.settings import GLOBAL_BATCH, run_settings
from tests.support.workers import JobFailedError

LINES, NUMBERS, QUESTIONS = "lines", "numbers", "questions"
WEIGHTS = [2.0, 1.0, 1.0]
BY_SOURCE = ("loss/", "eval/", "epoch/")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two texts, and examples of which few predictions count; their losses differ."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    texts = {
        LINES: [" ".join(rng.choice(["the", "cache", "of", "any", "layer\n"], 30)) for _ in range(40)],
        NUMBERS: [" ".join(map(str, rng.integers(0, 10**6, 12))) for _ in range(60)],
    }
    for name, documents in texts.items():
        rows = (json.dumps({"text": document}) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text("".join(rows))
    rows = (json.dumps({"q": f"{n}?", "a": f" {n}{n}"}) + "\n" for n in range(120))
    (folder / f"{QUESTIONS}.jsonl").write_text("".join(rows))
    fields: list[dict[str, str]] = [{}, {}, {"prompt_field": "q", "response_field": "a"}]
    return [
        {"path": str(folder / f"{name}.jsonl"), "format": "jsonl", "weight": weight, **keys}
        for name, weight, keys in zip((LINES, NUMBERS, QUESTIONS), WEIGHTS, fields)
    ]


def settings(sources: list[dict[str, Any]], out: Path, **sections: Any) -> dict[str, Any]:
    data = {
        "sources": sources,
        "reset_attention": True,
        "validation_fraction": 0.2,
        "cache_dir": str(Path(sources[0]["path"]).parent / "cache"),
        **sections.get("data", {}),
    }
    model = {"num_layers": 4, **sections.get("model", {})}
    return run_settings(out, out, **{**sections, "data": data, "model": model})


@pytest.fixture(scope="module")
def alone(workers: Any, sources: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run in one process, and its lines."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, workers(1)(run_training, settings(sources, out, checkpoint={"every": 3}))[0]


def figures(lines: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
    return {
        (line["step"], name): line[name] for line in lines for name in line if name.startswith(("loss", *BY_SOURCE))
    }


def counted(given: dict[str, Any], begin: int, end: int, *, held_out: bool = False) -> dict[str, float]:
    """Predictions of each source that count in some samples of a run's data."""
    config = DataConfig.model_validate(given["data"])
    blend = open_data(config, ByteTokenizer(), given["train"]["seed"], lambda: None)[held_out]
    seed = config.split_seed if held_out else given["train"]["seed"]
    counts = dict.fromkeys((LINES, NUMBERS, QUESTIONS), 0.0)
    assert blend is not None
    for position in range(begin, end):
        number, _ = blended(position, WEIGHTS, seed)
        counts[list(counts)[number]] += float(collate(0, [blend[position]], True).loss_mask.sum())
    return counts


def check_sums(lines: list[dict[str, Any]], given: dict[str, Any]) -> None:
    """The losses by source, weighted by their predictions, are the loss."""
    assert [line["step"] for line in lines] == list(range(1, 7))
    for line in lines:
        end = line["step"] * GLOBAL_BATCH
        groups = [("loss", counted(given, end - GLOBAL_BATCH, end))]
        if "eval/loss@1.00" in line:
            held_out = counted(given, 0, given["eval"]["samples"], held_out=True)
            groups += [(f"eval/loss@{retention}", held_out) for retention in ("1.00", "0.50")]
        for name, counts in groups:
            seen = {source: count for source, count in counts.items() if count}
            assert {key for key in line if key.startswith(f"{name}/")} == {f"{name}/{source}" for source in seen}
            weighted = sum(line[f"{name}/{source}"] * count for source, count in seen.items())
            assert weighted / sum(seen.values()) == pytest.approx(line[name], rel=1e-6)


def test_losses_by_source_add_up_to_the_loss(alone: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    check_sums(alone[1], settings(sources, tmp_path))
    last = alone[1][-1]
    assert len({round(last[f"loss/{name}"], 2) for name in (LINES, NUMBERS, QUESTIONS)}) == 3


def test_sources_that_are_mixed_up_are_noticed(workers: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    given = settings(sources, tmp_path / "run")
    lines = workers(1)(run_with_sources_shifted, given, len(sources))[0]
    with pytest.raises(AssertionError):
        check_sums(lines, given)


@pytest.mark.parametrize(
    ("processes", "sections"),
    [
        (2, {"parallel": {"tensor": 2, "sequence_parallel": True}}),
        (2, {"parallel": {"pipeline": 2, "zero_stage": 0}}),
        (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2, "zero_stage": 1}}),
        (2, {"parallel": {"zero_stage": 1}}),
        (2, {"parallel": {"zero_stage": 3}}),
    ],
    ids=str,
)
def test_layouts_equal_one_process(
    workers: Any, alone: Any, sources: list[dict[str, Any]], tmp_path: Path, processes: int, sections: dict[str, Any]
) -> None:
    found = workers(processes)(run_training, settings(sources, tmp_path / "run", **sections))[0]
    assert figures(found) == pytest.approx(figures(alone[1]), rel=1e-5)


def test_a_source_has_the_loss_of_its_samples_alone(
    workers: Any, sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The same model, before its first update, on the same sequences without those of other sources."""

    def run(name: str, chosen: list[dict[str, Any]], batch: int, samples: int) -> list[dict[str, Any]]:
        given = settings(
            chosen,
            tmp_path / name,
            routing={"policy": "none", "cross_prob": 0.0},
            train={"steps": 1, "global_batch_size": batch, "micro_batch_size": 1},
            eval={"at_start": True, "every": 1, "samples": samples},
        )
        return workers(1)(run_training, given)[0]

    before, step = run("all", sources, GLOBAL_BATCH, 12)
    trained = num_blended(GLOBAL_BATCH, WEIGHTS, 7)
    evaluated = num_blended(12, WEIGHTS, 0)
    assert min(*trained, *evaluated) > 0
    for source, batch, samples in zip(sources, trained, evaluated):
        name = Path(source["path"]).stem
        before_alone, alone = run(name, [source], batch, samples)
        assert step[f"loss/{name}"] == pytest.approx(alone["loss"], rel=1e-5)
        assert before[f"eval/loss@0.50/{name}"] == pytest.approx(before_alone["eval/loss@0.50"], rel=1e-5)


def test_a_run_that_goes_on_goes_on_by_source(
    workers: Any, alone: Any, sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = settings(sources, out, checkpoint={"every": 3})
    whole = workers(1)(run_training, given)[0]
    assert figures(whole) == figures(alone[1])
    resume = {"every": 3, "resume": str(out / "checkpoints" / "step_00000003")}
    again = workers(1)(run_training, settings(sources, out, checkpoint=resume))[0]
    assert figures(again) == figures(whole)
    assert [line["time"] for line in again[:3]] == [line["time"] for line in whole[:3]]
    assert again[3]["time"] > whole[-1]["time"]


def test_with_a_teacher_it_is_the_loss_on_the_text(
    workers: Any, alone: Any, sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    teacher = str(alone[0] / "checkpoints" / "step_00000006")
    for processes, parallel in ((1, {}), (2, {"pipeline": 2})):
        given = settings(
            sources,
            tmp_path / f"{processes}",
            parallel={"zero_stage": 0, **parallel},
            distillation={"weight": 0.5, "teacher": teacher},
            checkpoint={"init_from": teacher},
        )
        check_sums(workers(processes)(run_training, given)[0], given)


def test_adapters_too(workers: Any, alone: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    begin = {"init_from": str(alone[0] / "checkpoints" / "step_00000006")}
    given = settings(sources, tmp_path / "run", lora={"rank": 2}, checkpoint=begin, parallel={"zero_stage": 1})
    check_sums(workers(2)(run_training, given)[0], given)


def test_streams_say_what_is_whose(workers: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    """One rank of a replica reads, and the last stage, or another tensor-parallel rank, must know too."""

    def run(name: str, processes: int, reset: bool = True, **parallel: Any) -> list[dict[str, Any]]:
        streaming = {"streaming": True, "stream_lanes": 4, "shuffle_buffer": 12, "reset_attention": reset}
        given = settings(sources[:2], tmp_path / name, data=streaming, parallel={"zero_stage": 1, **parallel})
        return workers(processes)(run_training, given)[0]

    one = run("one", 1, reset=False)
    for step, line in enumerate(one):
        counts = np.diff([num_blended(end * GLOBAL_BATCH, WEIGHTS[:2], 7) for end in (step, step + 1)], axis=0)[0]
        weighted = counts @ [line[f"loss/{LINES}"], line[f"loss/{NUMBERS}"]] / GLOBAL_BATCH
        assert weighted == pytest.approx(line["loss"], rel=1e-6)
        assert not any(name.startswith("epoch") for name in line)
    expected = figures(run("reset", 1))
    assert (3, f"eval/loss@0.50/{NUMBERS}") in expected
    for number, parallel in enumerate([{}, {"tensor": 2}, {"pipeline": 2}]):
        assert figures(run(f"two{number}", 2, **parallel)) == pytest.approx(expected, rel=1e-5)


def test_the_best_by_the_loss_on_one_source(workers: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    name, out = f"loss@0.50/{NUMBERS}", tmp_path / "run"
    given = settings(
        sources,
        out,
        optimizer={"lr": 0.15, "schedule": "constant"},  # so high that losses rise again
        eval={"every": 1, "best": name, "samples": 24},
        checkpoint={"keep_last": 1},
    )
    lines = workers(2)(run_training, given)[0]
    best = min((line[f"eval/{name}"], line["step"]) for line in lines)[1]
    assert (out / "checkpoints" / "best").read_text().strip() == f"step_{best:08d}"


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (
            {"best": "loss@0.50/words"},
            rf"eval\.best 'loss@0\.50/words' is not measured: take one of loss@1\.00, loss@0\.50, "
            rf"loss@1\.00/{LINES}, .*, loss@0\.50/{QUESTIONS} \(",
        ),
        ({"best": f"loss@0.50/{NUMBERS}"}, rf"has nothing to be measured on.*are of {LINES}, {QUESTIONS} alone"),
    ],
)
def test_a_source_that_is_not_measured_is_refused(
    workers: Any, sources: list[dict[str, Any]], tmp_path: Path, evaluation: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobFailedError, match=message):
        workers(2)(run_training, settings(sources, tmp_path / "run", eval=evaluation))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_measured_by_source(alone: Any, tmp_path: Path) -> None:
    out, lines = alone
    line = [str(out), "--json", str(tmp_path / "losses.json"), "--cached-layers", "0", "2"]
    command = Command(EVALUATE, line, {}, tmp_path / "log")
    assert command.wait() == 0, command.printed
    losses = json.loads((tmp_path / "losses.json").read_text())
    seen = (LINES, QUESTIONS)  # no sample of the other is among so few
    assert losses.keys() == {
        f"loss@{of}{name}" for of in ("1.00", "0.50", "layers 0,2") for name in ("", *(f"/{source}" for source in seen))
    }
    for name, loss in losses.items():
        assert loss == pytest.approx(lines[-1][f"eval/{name.replace('layers 0,2', '0.50')}"])
    for source in seen:
        assert f"{losses[f'loss@0.50/{source}']:.4f} on {source}\n" in command.printed


def test_epochs_by_source(alone: Any, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    given = settings(sources, tmp_path)
    blend, _ = open_data(DataConfig.model_validate(given["data"]), ByteTokenizer(), 7, lambda: None)
    sizes = np.array([len(each) for each in blend._sets])
    for line in alone[1]:
        read = np.bincount([blended(i, WEIGHTS, 7)[0] for i in range(line["step"] * GLOBAL_BATCH)], minlength=3)
        found = [line[f"epoch/{name}"] for name in (LINES, NUMBERS, QUESTIONS)]
        np.testing.assert_allclose(found, read / sizes)
        assert line["epoch"] == pytest.approx(read.sum() / sizes.sum())


def test_what_is_not_finite_stays_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_batch, "_is_last_stage", lambda: True)
    monkeypatch.setattr(run_batch, "_summed_from_last_stage", lambda values: values)
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    batch = MicroBatch(0, mask.long(), mask.long(), mask, None, torch.tensor([0, 1, 2]))
    sums = run_batch.sums_by_source([torch.tensor([np.inf, 3.0, 0.0])], [batch], 4)
    assert sums.tolist() == [[np.inf, 3.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0]]
    assert run_batch.means_by_source(sums, list("abcd")) == {"a": np.inf, "b": 1.5}  # nothing was seen of c and d


def test_the_console_leaves_out_losses_by_source(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.on_start(0, 2)
    console.on_step(0, {"eval/loss@1.00": 2.0, f"eval/loss@1.00/{LINES}": 1.0})
    assert capsys.readouterr().err == "step 0/2  loss@1.00 2.0000\n"


@pytest.mark.parametrize("index", [0, 1, 4095, 4096, 5000, 9000])
def test_samples_of_a_blend_are_counted(index: int) -> None:
    for weights in ([3.0, 1.0, 0.01], [1.0]):
        drawn = [blended(i, weights, 2)[0] for i in range(index)]
        assert num_blended(index, weights, 2) == np.bincount(drawn, minlength=len(weights)).tolist()


def test_one_source_has_no_names_and_every_line_its_time(
    workers: Any, sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    began = time.time()
    given = settings(sources[:1], tmp_path / "run", eval={"at_start": True})
    lines = workers(1)(run_training, given)[0]
    assert not [name for line in lines for name in line if name.count("/") == 2 or name.startswith(("loss/", "epoch/"))]
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    assert began - 0.001 <= times[0]
    assert times[-1] <= time.time() + 0.001
    assert all(line["epoch"] > 0 for line in lines[1:])
