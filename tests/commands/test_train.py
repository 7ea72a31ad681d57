"""`skv-train` on bad input: one line on stderr, no traceback, exit code 2, nothing trained."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.settings import config


def run(folder: Path, given: dict[str, Any], *overrides: str) -> subprocess.CompletedProcess[str]:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(given))
    return subprocess.run(
        [sys.executable, "-m", "skv_dist.commands.train", str(file), *overrides],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"},
    )


def settings(folder: Path, path: str, kind: str = "text") -> dict[str, Any]:
    given = config()
    source = {"path": str(folder / path), "format": kind}
    given["data"] = {"sequence_length": 16, "sources": [source], "cache_dir": str(folder / "cache")}
    given["train"]["output_dir"] = str(folder / "run")
    return given


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("a few words\n" * 500)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and nothing more")
    return tmp_path


CASES = [
    ("text.txt", "text", ["parallel.zero_stage=4"], "parallel.zero_stage"),
    ("text.txt", "text", ["parallel.tensor=3"], "model.num_attention_heads 4 is not divisible by parallel.tensor 3"),
    ("text.txt", "text", ["data.sequence_length=20000"], "holds no sequence of data.sequence_length 20000"),
    ("text.txt", "text", ["data.tokenizer=./nowhere"], "data.tokenizer './nowhere' is not a folder"),
    ("empty.txt", "text", [], "empty.txt"),
    ("damaged.parquet", "parquet", [], "damaged.parquet"),
    ("nothing*.txt", "text", [], "no file matches"),
]


@pytest.mark.parametrize(("path", "kind", "overrides", "message"), CASES)
def test_one_line_and_a_failing_exit(folder: Path, path: str, kind: str, overrides: list[str], message: str) -> None:
    done = run(folder, settings(folder, path, kind), *overrides)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert not (folder / "run").exists()


def test_prepared_data_of_another_tokenizer(folder: Path) -> None:
    from skv_dist.config.data import SourceConfig
    from skv_dist.data.tokenize import prepare
    from skv_dist.data.tokenizer import ByteTokenizer

    class Other(ByteTokenizer):
        name = "other"

        def fingerprint(self) -> str:
            return "other"

    source = SourceConfig(path=str(folder / "text.txt"), format="text")
    prepare([source], Other(), folder / "prepared", progress=False)
    done = run(folder, settings(folder, "prepared", "prepared"))
    assert done.returncode == 2
    assert "was made with tokenizer 'other', but data.tokenizer is 'byte'" in done.stderr
    assert "Traceback" not in done.stderr
