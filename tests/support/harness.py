"""Small tasks of our own for lm-evaluation-harness, and the command that runs them."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Command, free_port, places
from tests.support.runs import EVALUATE

LONGEST = 48  # tokens that the model can see: some documents are longer
NEW = 12  # tokens of an answer
UNTIL = [" ch", "\n"]
WORDS = "the cache of any layer may be cut"
DOCUMENTS = [
    {"before": before, "choices": choices, "right": number % len(choices)}
    for number, (before, choices) in enumerate(
        [
            ("the cache", [" of any", " may be cut", " l"]),
            (f"{WORDS} {WORDS} {WORDS} {WORDS}", [" the", " layer may be"]),  # cut from the left
            ("of any layer ", ["of", "cut", "may"]),  # the space goes with what follows
            ("any", ["\n", " ", "x", "y"]),  # one token each
            ("", ["the cache", "cut"]),
            ("be cut", [" of any layer" * 3, " be"]),
        ]
    )
]

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the package lm_eval")


def write_tasks(folder: Path, **generation: Any) -> Path:
    """Tasks of our own, in a group."""
    tasks = folder / "tasks"
    tasks.mkdir()
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "documents.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{before}}",
    }
    kinds: dict[str, dict[str, Any]] = {
        "skv_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "right",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "skv_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{before}}{{choices[0]}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
        "skv_said": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": UNTIL, "max_gen_toks": NEW, **generation},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, fields in kinds.items():
        (tasks / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **fields}))
    whole = {"group": "skv_all", "task": list(kinds)}
    (tasks / "all.yaml").write_text(json.dumps(whole))
    return tasks


def without_stock_tasks() -> None:
    """It takes lm_eval twelve seconds to list the thousands of tasks that it comes with."""
    from lm_eval.tasks import TaskManager

    stock = TaskManager.__init__
    TaskManager.__init__ = lambda *given, **named: stock(*given, **named, include_defaults=False)


def run_harness(
    folder: Path,
    checkpoint: Path,
    *arguments: str,
    processes: int = 1,
    first: Callable[[], None] | None = without_stock_tasks,
) -> tuple[list[str], Any]:
    """What each process printed, and the figures by map."""
    port, file = free_port(), folder / f"found{processes}.json"
    given = ["harness", str(checkpoint), "--json", str(file), "--retention", "1", "0.5", *arguments]
    commands = [
        Command(EVALUATE, given, places(rank, processes, port), folder / f"{rank}.log", folder / f"{rank}.err", first)
        for rank in range(processes)
    ]
    for rank, command in enumerate(commands):
        assert command.wait() == 0, (folder / f"{rank}.err").read_text()
    return [command.printed for command in commands], json.loads(file.read_text())["maps"]


def of_all(folder: Path, checkpoint: Path, *arguments: str, **given: Any) -> tuple[list[str], Any]:
    tasks = ("--tasks", "skv_all", "--include-path", str(write_tasks(folder)), "--log-samples", "--batch-size", "3")
    return run_harness(folder, checkpoint, *tasks, *arguments, **given)


def flat(answers: Any) -> dict[str, Any]:
    """Numbers and texts by their place, which pytest.approx can compare."""
    if not isinstance(answers, list):
        return {"": answers}
    return {f"{i}.{at}": value for i, answer in enumerate(answers) for at, value in flat(answer).items()}
