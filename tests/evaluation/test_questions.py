"""Answers scored as SQuAD defines it, and the command that asks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from skv_dist.config.evaluations import check_questions
from skv_dist.config.run import RunConfig
from skv_dist.config.train import SCORES
from skv_dist.errors import UserError
from skv_dist.evaluation.answer_scores import exact_match, normalized, token_f1
from tests.support.jobs.loop import run_training
from tests.support.processes import Command, free_port, places
from tests.support.runs import EVALUATE
from tests.support.settings import run_settings


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [  # what SQuAD's own script gives
        ("The Snow Man!", ["snow man"], 1, 1),
        ("a cat sat", ["the cat sat down"], 0, 4 / 5),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("nothing here", ["another", "nothing at all"], 0, 2 / 5),
        ("", ["words"], 0, 0),
        ("the", ["an"], 1, 1),
        ("well-known", ["wellknown"], 1, 1),
    ],
)
def test_scores_are_those_of_squad(answer: str, references: list[str], exact: float, f1: float) -> None:
    assert exact_match(answer, references) == exact
    assert token_f1(answer, references) == pytest.approx(f1)


def test_articles_go_as_words_only() -> None:
    assert normalized("An ant, the theatre; a data-set.") == "ant theatre dataset"


STEPS = 40
ROWS = [{"q": f"{letter}{letter}=", "a": letter * (1 + (letter < "d"))} for letter in "abcdef"]  # of two lengths


def settings_of(folder: Path, **sections: Any) -> dict[str, Any]:
    """A run that learns to repeat letters, from examples."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = {"path": str(file), "format": "jsonl", "prompt_field": "q", "response_field": "a"}
    return run_settings(
        folder,
        folder / "run",
        model={"num_layers": 4},
        data={
            "sources": [source],
            "reset_attention": True,
            "validation_fraction": 0,
            "sequence_length": 16,
            "cache_dir": str(folder / "cache"),
            **sections.get("data", {}),
        },
        train={"steps": STEPS, **sections.get("train", {})},
        eval={"every": 0, **sections.get("eval", {})},
        optimizer={"lr": 0.02},
        routing=sections.get("routing", {"policy": "subset", "keep_probs": [1.0, 0.5]}),
        parallel=sections.get("parallel", {}),
    )


@pytest.fixture(scope="module")
def checkpoint(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the finished run."""
    folder = tmp_path_factory.mktemp("questions")
    lines = workers(1)(run_training, settings_of(folder))[0]
    assert lines[-1]["loss"] < 0.1
    return folder / "run" / "checkpoints" / f"step_{STEPS:08d}"


def ask(
    folder: Path, checkpoint: Path, *arguments: object, processes: int = 1, keep: bool = False
) -> tuple[str, dict[str, Any]]:
    """What the first process printed, and its figures; on questions with two references, or on those that are there."""
    file = folder / "rows.jsonl"
    if not keep:
        file.write_text("".join(json.dumps({"q": row["q"], "all": [row["a"], "else"]}) + "\n" for row in ROWS))
    port = free_port()
    given = ["questions", checkpoint, file, "--answers-field", "all", *arguments, "--json", folder / "scores.json"]
    commands = [
        Command(EVALUATE, list(map(str, given)), places(rank, processes, port), folder / f"{rank}.log")
        for rank in range(processes)
    ]
    for command in commands:
        assert command.wait() == 0, command.printed
    return commands[0].printed, json.loads((folder / "scores.json").read_text())


def test_questions_are_scored_by_cache_size(checkpoint: Path, tmp_path: Path) -> None:
    printed, scores = ask(tmp_path, checkpoint, "--retention", 1, 0.5, "--new-tokens", 4, "--batch-size", 4)
    assert scores["1.00"]["exact_match"] == scores["1.00"]["token_f1"] == 100
    assert [answer["text"] for answer in scores["1.00"]["answers"]] == [row["a"] for row in ROWS]
    assert scores["0.50"]["cache_bytes_per_token"] * 2 == scores["1.00"]["cache_bytes_per_token"]
    assert "2 of 4" in printed


def test_another_layout_answers_the_same(checkpoint: Path, tmp_path: Path) -> None:
    _, alone = ask(tmp_path, checkpoint, "--retention", 1, 0.5, "--new-tokens", 4)
    _, spread = ask(tmp_path, checkpoint, "--retention", 1, 0.5, "parallel.pipeline=2", "--new-tokens", 4, processes=4)
    assert spread == alone


@pytest.mark.parametrize(
    ("processes", "parallel", "train"),
    [
        (1, {}, {}),
        (4, {"pipeline": 2, "zero_stage": 1}, {}),
        (2, {"zero_stage": 3}, {}),
        (2, {"tensor": 2, "sequence_parallel": True}, {}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
        (4, {"pipeline": 2, "zero_stage": 3, "engine": "fsdp"}, {}),
        (1, {}, {"compile": True}),  # of one map alone, as each is compiled for itself
    ],
)
def test_questions_during_training_score_as_those_of_its_checkpoint(
    workers: Any, tmp_path: Path, processes: int, parallel: dict[str, Any], train: dict[str, Any]
) -> None:
    questions = {"path": str(tmp_path / "rows.jsonl"), "new_tokens": 4, "batch_size": 3}
    sizes = [1.0] if train else [1.0, 0.5]
    evaluation = {"every": STEPS // 2, "at_start": True, "retention": sizes, "questions": questions, "samples": 4}
    held_out = {"path": str(tmp_path / "rows.jsonl"), "format": "jsonl", "prompt_field": "q", "response_field": "a"}
    settings = settings_of(
        tmp_path,
        data={"validation_sources": [held_out]},
        eval={**evaluation, "best": "token_f1@1.00"},
        train=train,
        parallel=parallel,
        **({"routing": {"policy": "none"}} if train else {}),
    )
    metrics = [line for line in workers(processes)(run_training, settings)[0] if "eval/loss@1.00" in line]
    assert [line["step"] for line in metrics] == [0, STEPS // 2, STEPS]
    assert metrics[0]["eval/token_f1@1.00"] < 10
    assert metrics[-1]["eval/token_f1@1.00"] > 50
    root = tmp_path / "run" / "checkpoints"
    best = max(metrics[1:], key=lambda line: line["eval/token_f1@1.00"])
    assert (root / "best").read_text().strip() == f"step_{best['step']:08d}"
    line = ("--retention", *sizes, "--answers-field", "a", "--new-tokens", 4)
    _, scores = ask(tmp_path, root / f"step_{STEPS:08d}", *line, keep=True)
    for kind in SCORES:
        for size in scores:
            assert scores[size][kind] == pytest.approx(metrics[-1][f"eval/{kind}@{size}"])


def test_a_run_that_would_never_ask_does_not_start(tmp_path: Path) -> None:
    asked = {"every": 0, "questions": {"path": "rows.jsonl"}}
    run = RunConfig.model_validate(settings_of(tmp_path, eval=asked))
    with pytest.raises(UserError, match=re.escape("eval.questions is given, but eval.every is 0")):
        check_questions(run)


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        ({"q": "x"}, [], "row 1 is no question: 'all'"),
        ({"q": None, "all": ["x"]}, [], "row 1 is no question: null"),
        ({"q": "x", "all": 3}, [], "row 1: field 'all' is no text and no list of texts"),
        ({"q": "x", "all": "x"}, ["--prompt-field", "{q"], "--prompt-field '{q' cannot be read"),
        ({"q": "x", "all": "x"}, ["--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_bad_questions_are_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, row: dict[str, Any], arguments: list[str], message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    given = ["questions", str(checkpoint), str(file), "--answers-field", "all", *arguments]
    refused(tmp_path, given, message)


def test_no_more_is_read_than_is_asked(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"q": "aa=", "all": "aa"}) + "\n" + "no question\n")
    _, scores = ask(tmp_path, checkpoint, "--number", 1, "--retention", 1, keep=True)
    assert [answer["text"] for answer in scores["1.00"]["answers"]] == ["aa"]
    refused(
        tmp_path, ["questions", str(checkpoint), str(file), "--answers-field", "all"], "line 2 is not a JSON object"
    )


def test_an_empty_name_is_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    refused(tmp_path, ["questions", str(checkpoint), ""], "the name of the file of questions is empty")


def refused(tmp_path: Path, given: list[str], message: str) -> None:
    command = Command(EVALUATE, given, {}, tmp_path / "printed.log")
    assert command.wait() == 2, command.printed
    assert message in command.printed
    assert "Traceback" not in command.printed
