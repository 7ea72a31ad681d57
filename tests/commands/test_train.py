"""`skv-train`: one line and exit code 2 on bad input, and what SIGTERM does."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from skv_dist.checkpoint import folder as files
from tests.support.processes import Command
from tests.support.runs import TRAIN, has_stepped
from tests.support.settings import run_settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("a few words\n" * 500)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and nothing more")
    return tmp_path


def refused(folder: Path, path: str, file_format: str, *overrides: str) -> str:
    """The one line that the command prints where it refuses to train on ``path``."""
    given: dict[str, Any] = run_settings(folder, folder / "run")
    given["data"]["sources"] = [{"path": str(folder / path), "format": file_format}]
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(given))
    command = Command(TRAIN, [str(file), *overrides], {"HF_HUB_OFFLINE": "1"}, folder / "printed.log")
    assert command.wait() == 2, command.printed
    assert "Traceback" not in command.printed
    assert not (folder / "run").exists()
    (line,) = [line for line in command.printed.splitlines() if "error:" in line]
    return line


@pytest.mark.parametrize(
    ("path", "file_format", "override", "message"),
    [
        ("text.txt", "text", "parallel.zero_stage=4", "parallel.zero_stage"),
        ("text.txt", "text", "parallel.tensor=3", "num_attention_heads 4 is not divisible by parallel.tensor 3"),
        ("text.txt", "text", "data.sequence_length=20000", "holds no sequence of data.sequence_length 20000"),
        ("text.txt", "text", "data.tokenizer=./nowhere", "data.tokenizer './nowhere' is not a folder"),
        ("text.txt", "text", "model.vocab_size=258", "model.vocab_size 258 is smaller than the 259 tokens"),
        ("empty.txt", "text", None, "empty.txt"),
        ("damaged.parquet", "parquet", None, "damaged.parquet"),
        ("nothing*.txt", "text", None, "no file matches"),
    ],
)
def test_bad_input_is_one_line_and_a_failing_exit(
    folder: Path, path: str, file_format: str, override: str | None, message: str
) -> None:
    assert message in refused(folder, path, file_format, *([override] if override else []))


def test_prepared_data_of_another_tokenizer_is_refused(folder: Path) -> None:
    from skv_dist.config.data import SourceConfig
    from skv_dist.data.tokenize import prepare
    from skv_dist.data.tokenizer import ByteTokenizer

    class Other(ByteTokenizer):
        name = "other"

        def fingerprint(self) -> str:
            return "other"

    source = SourceConfig(path=str(folder / "text.txt"), format="text")
    prepare([source], Other(), folder / "prepared", progress=False)
    line = refused(folder, "prepared", "prepared")
    assert "was made with tokenizer 'other', but data.tokenizer is 'byte'" in line


def test_sigterm_ends_after_the_step_with_a_checkpoint(text: Path, tmp_path: Path) -> None:
    """As a shell starts it, in a new interpreter."""
    out = tmp_path / "run"
    file = tmp_path / "run.yaml"
    given = run_settings(text, out, train={"steps": 100000}, eval={"every": 10**6}, parallel={"zero_stage": 0})
    file.write_text(yaml.safe_dump(given))
    with (tmp_path / "printed.log").open("w+") as printed:
        process = subprocess.Popen([sys.executable, "-m", TRAIN, str(file)], stdout=printed, stderr=printed, text=True)
        try:
            while not has_stepped(out) and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            code = process.wait()
        finally:
            process.kill()
    said = (tmp_path / "printed.log").read_text()
    assert code == 0, said
    step = (out / "metrics.jsonl").read_text().count("\n")
    assert f"stopped by SIGTERM after step {step}" in said
    files.verify(files.folder_of(out / "checkpoints", step))
