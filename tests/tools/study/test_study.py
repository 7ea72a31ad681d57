"""A study runs what is missing, says what failed, and writes a page. The trainer is a stand-in that takes no time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from skv_tools.study import __main__ as study
from skv_tools.study.page import difference, page
from skv_tools.study.runs import load

from skv_dist.errors import UserError
from skv_dist.evaluation.comparison import LOSS

TRAINER = """
import json, pathlib, sys
keys = dict(argument.split("=", 1) for argument in sys.argv[2:])
if keys.get("routing.policy") == "broken":
    sys.exit("it broke")
out = pathlib.Path(keys["train.output_dir"])
steps = 1 if keys.get("train.stops") or keys.get("eval.patience") else 2
if keys.get("eval.patience"):
    print("loss@0.50 was 4.1 at step 1 and not lower in 1 evaluations since: the run ends (eval.patience)")
loss = 3.0 + 0.1 * int(keys["train.seed"]) + (0.5 if keys["routing.policy"] == "r_cla" else 0.0)
lines = [
    {"step": step, "tokens_per_second": 10.0, "skipped": 0, "eval/loss@1.00": loss, "eval/loss@0.50": loss + 1}
    for step in range(1, steps + 1)
]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(out / "config.yaml").write_text("{train: {steps: 2}, eval: {retention: [1.0, 0.5]}}")
print("model:     a small one")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stand_in_trainer.py").write_text(TRAINER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(study, "TRAIN", "stand_in_trainer")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **changes: Any) -> Path:
    given = {
        "title": "Title",
        "page": "page.md",
        "output": "runs",
        "base": "base.yaml",
        "seeds": [1, 2],
        "runs_per_gpu": 2,
        "variants": {"dense": {"set": ["routing.policy=none"]}, "routed": {"set": ["routing.policy=r_cla"]}},
        "compare": [["dense", "routed"]],
        **changes,
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(given))
    return file


def test_what_is_missing_is_run_and_the_page_says_it(folder: Path) -> None:
    given, runs = load(write(folder))
    assert [(run.variant, run.seed) for run in runs] == [("dense", 1), ("dense", 2), ("routed", 1), ("routed", 2)]
    said: list[str] = []
    assert study.execute(runs[:3], [""], said.append) == 0
    assert [run.record is not None for run in runs] == [True, True, True, False]
    assert study.execute([run for run in runs if run.record is None], [""], said.append) == 0
    text = page(folder / "study.yaml", given, runs, "stand_in_trainer")
    assert "| dense | 2 | 3.150 ± 0.071 | 4.150 ± 0.071 |" in text
    assert "| routed minus dense | 2 | **+0.500** (error 0.000; +0.500 to +0.500)" in text
    assert "- model: a small one" in text
    assert (
        "python -m stand_in_trainer base.yaml routing.policy=r_cla train.seed=2 train.output_dir=runs/routed/2" in text
    )


def test_shares_are_compared_in_loss_and_in_scores(folder: Path) -> None:
    given, runs = load(write(folder, compare_shares=[["dense@1.00", "routed@0.50"]]))
    assert study.execute(runs, [""], lambda line: None) == 0
    for run in runs:
        best = 50 + run.seed + (run.variant == "routed")
        answers = {name: {"token_f1": best - cut, "exact_match": 10.0} for name, cut in (("1.00", 0), ("0.50", 8))}
        (run.folder / "questions.json").write_text(json.dumps(answers))
    text = page(folder / "study.yaml", given, runs, "stand_in_trainer")
    title = "routed at 50 % minus dense at 100 %"
    assert f"| {title} | 2 | 4.650 ± 0.071 | 3.150 ± 0.071 | **+1.500** (error 0.000; +1.500 to +1.500) |" in text
    assert f"| {title} | 2 | 44.5 ± 0.7 | 51.5 ± 0.7 | **-7.000** (error 0.000; -7.000 to -7.000) |" in text


def test_a_run_waits_for_the_one_that_it_reads_from(folder: Path) -> None:
    variants = {
        "student": {"set": ["routing.policy=r_cla", "distillation.teacher=runs/teacher/{seed}/checkpoints"]},
        "teacher": {"set": ["routing.policy=none"]},
    }
    _, runs = load(write(folder, variants=variants, runs_per_gpu=8))
    said: list[str] = []
    assert study.execute(runs, [""], said.append) == 0
    for seed in (1, 2):
        begins = said.index(f"student, seed {seed}: started")
        assert any(line.startswith(f"teacher, seed {seed}: finished") for line in said[:begins])
    assert "distillation.teacher=runs/teacher/2/checkpoints" in runs[1].arguments


def test_what_reads_from_a_failed_run_is_counted_as_failed(folder: Path) -> None:
    variants = {
        "student": {"set": ["routing.policy=r_cla", "distillation.teacher=runs/teacher/{seed}/checkpoints"]},
        "teacher": {"set": ["routing.policy=broken"]},
    }
    _, runs = load(write(folder, seeds=[1], variants=variants))
    said: list[str] = []
    assert study.execute(runs, [""], said.append) == 2
    assert said[-1] == "1 not started, which read from what is not finished: teacher, seed 1"


@pytest.mark.parametrize("argument", ["routing.policy=broken", "train.stops=1"])
def test_a_run_that_fails_or_stops_early_is_not_taken_for_finished(folder: Path, argument: str) -> None:
    arguments = ["routing.policy=none"] if argument.startswith("train") else []
    _, runs = load(write(folder, seeds=[1], variants={"bad": {"set": [*arguments, argument]}}))
    said: list[str] = []
    assert study.execute(runs, [""], said.append) == 1
    assert runs[0].record is None
    assert "failed" in said[-1]


def test_a_run_that_ended_as_nothing_got_better_is_finished(folder: Path) -> None:
    _, runs = load(write(folder, seeds=[1], variants={"patient": {"set": ["routing.policy=none", "eval.patience=1"]}}))
    assert study.execute(runs, [""], lambda line: None) == 0
    assert runs[0].record is not None


def test_a_measurement_that_fails_says_why_and_does_not_train_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "stand_in_evaluation.py").write_text("import sys; sys.exit('the questions have no form')")
    monkeypatch.setattr(study, "EVALUATE", "stand_in_evaluation")
    _, runs = load(write(folder, seeds=[1], variants={"asked": {"set": ["routing.policy=none"], "questions": ["q"]}}))
    said: list[str] = []
    assert study.execute(runs, [""], said.append) == 1
    assert said[1:] == ["asked, seed 1: failed: the questions have no form"]
    assert runs[0].record is None


def test_a_difference_needs_two_seeds_and_shows_its_error() -> None:
    assert difference([0.5]) == ""
    assert difference([0.1, 0.2, 0.3]) == "**+0.200** (error 0.058; -0.048 to +0.448)"


def test_what_is_no_study_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("[1, 2]")
    with pytest.raises(UserError, match="is no study"):
        load(tmp_path / "bad.yaml")


def test_the_study_that_is_kept_can_be_read() -> None:
    given, runs = load(Path("configs/study/draws.yaml"))
    assert len(runs) == 29
    assert {name for pair in given["compare"] for name in pair} == set(given["variants"])


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "skv_tools.study", "none.yaml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot read none.yaml" in done.stderr
    assert json.dumps(done.stderr).count("Traceback") == 0


def test_runs_of_unequal_length_are_compared_after_their_last_steps(folder: Path) -> None:
    given, runs = load(write(folder))
    assert study.execute(runs, [""], lambda _: None) == 0
    for run in runs[2:]:  # one that was three times as long, and no step at which all were measured
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        longer = [{**line, "step": 3 * line["step"] + 1, f"{LOSS}1.00": 1.0, f"{LOSS}0.50": 2.0} for line in lines]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in longer))
    text = page(folder / "study.yaml", given, runs, "stand_in_trainer")
    assert "| routed | 2 | 1.000 ± 0.000 | 2.000 ± 0.000 |" in text
    assert "Loss by step" not in text
