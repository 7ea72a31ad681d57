"""Answers scored as SQuAD defines it, and the command that asks."""

import json
from pathlib import Path
from typing import Any

import pytest

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
ROWS = [{"q": f"{letter}{letter}=", "a": letter * 2} for letter in "abcdef"]


@pytest.fixture(scope="module")
def checkpoint(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that has learned to repeat a letter, from examples."""
    folder = tmp_path_factory.mktemp("questions")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = {"path": str(file), "format": "jsonl", "prompt_field": "q", "response_field": "a"}
    settings = run_settings(
        folder,
        folder / "run",
        model={"num_layers": 4},
        data={
            "sources": [source],
            "reset_attention": True,
            "validation_fraction": 0,
            "sequence_length": 16,
            "cache_dir": str(folder / "cache"),
        },
        train={"steps": STEPS},
        eval={"every": 0},
        optimizer={"lr": 0.02},
        routing={"policy": "subset", "keep_probs": [1.0, 0.5]},
    )
    lines = workers(1)(run_training, settings)[0]
    assert lines[-1]["loss"] < 0.1
    return folder / "run" / "checkpoints" / f"step_{STEPS:08d}"


def ask(folder: Path, checkpoint: Path, *arguments: object, processes: int = 1) -> tuple[str, dict[str, Any]]:
    """What the first process printed, and its figures."""
    file = folder / "rows.jsonl"
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
    ("row", "arguments", "message"),
    [
        ({"q": "x"}, [], "row 1 is no question: 'all'"),
        ({"q": None, "all": ["x"]}, [], "row 1 is no question: null"),
        ({"q": "x", "all": 3}, [], "row 1: field 'all' is no text and no list of texts"),
        ({"q": "x", "all": "x"}, ["--prompt-field", "{q"], "--prompt-field '{q' cannot be read"),
        ({"q": "x", "all": "x"}, ["parallel.sequence_parallel=true", "parallel.tensor=1"], "sequence_parallel"),
        ({"q": "x", "all": "x"}, ["--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_bad_questions_are_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, row: dict[str, Any], arguments: list[str], message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    given = ["questions", str(checkpoint), str(file), "--answers-field", "all", *arguments]
    command = Command(EVALUATE, given, {}, tmp_path / "printed.log")
    assert command.wait() == 2, command.printed
    assert message in command.printed
    assert "Traceback" not in command.printed
