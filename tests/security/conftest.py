"""A checkpoint with a tokenizer of its own, and an exported folder of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from skv_dist.checkpoint import folder as files
from tests.support.jobs.commands import outcome_of
from tests.support.jobs.loop import run_training
from tests.support.settings import run_settings
from tests.tools.convert.hf_models import words_tokenizer


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    words_tokenizer().save_pretrained(folder)
    return folder


def settings(text: Path, words: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of one step."""
    return run_settings(
        text,
        out,
        **{
            "model": {"num_layers": 2, "num_kv_heads": 4},
            "data": {"tokenizer": str(words)},
            "train": {"steps": 1},
            "eval": {"every": 0},
            **sections,
        },
    )


@pytest.fixture(scope="session")
def whole(workers: Any, text: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint. Not to be changed."""
    out = tmp_path_factory.mktemp("whole")
    workers(1)(run_training, settings(text, words, out))
    return files.folder_of(out / "checkpoints", 1)


@pytest.fixture(scope="session")
def exported(workers: Any, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint for engines, its layers sharing. Not to be changed."""
    out = tmp_path_factory.mktemp("exported") / "folder"
    arguments = ["to-hf", str(whole), str(out), "--retention", "0.5", "--no-verify"]
    assert workers(1)(outcome_of, "skv_tools.convert.cli", arguments) == [("ended", "0")]
    return out


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    file.write_text(json.dumps({"question": "w3 w4", "answer": "w5"}) + "\n")
    return file
