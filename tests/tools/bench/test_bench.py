"""Benchmarks: where their shapes come from, and that our trainer and its peers run on a CPU."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from skv_tools.bench import shapes
from skv_tools.bench.shapes import SHAPES, read_shape

from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError
from tests.support.processes import Command

CHECKOUT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_that_of_its_file_but_for_what_is_changed(name: str) -> None:
    file, changes = shapes._SHAPES[name]
    section = yaml.safe_load((CHECKOUT / "configs" / "models" / f"{file}.yaml").read_text())["model"]
    shape = read_shape(name).model_dump()
    expected = ModelConfig(**section).model_dump()
    assert {key for key in expected if shape[key] != expected[key]} <= changes.keys()
    assert shape["vocab_size"] is not None


def test_without_configs_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installed package; the working folder may be a checkout all the same."""
    monkeypatch.setattr(shapes, "__file__", str(tmp_path / "site-packages" / "skv_tools" / "bench" / "shapes.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run this in a source checkout"):
        read_shape("qwen3-8b")
    shutil.copytree(CHECKOUT / "configs", tmp_path / "configs")
    assert read_shape("qwen3-8b").num_layers == 36


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("train", ["--rounds=1", "--routing", "r_cla"]),
        ("peers", ["--peer=transformers", "--masters=none", "--compile=none"]),
    ],
)
def test_training_benchmarks_run(tmp_path: Path, module: str, options: list[str]) -> None:
    out = tmp_path / "out.json"
    batch = ["--shape=tiny", "--sequence-length=16", "--micro-batch=2", "--steps=4", "--warmup=1"]
    command = Command(f"skv_tools.bench.{module}", [*batch, *options, f"--out={out}"], {}, tmp_path / "printed.log")
    assert command.wait() == 0, command.printed
    report = json.loads(out.read_text())
    assert report.get("r_cla", report)["tokens_per_second"] > 0
    assert report["device"] == "CPU"


@pytest.mark.parametrize("model", ["exported", "trained"])
def test_prefill_is_timed_with_and_without_skipping(tmp_path: Path, model: str) -> None:
    line = ["--model", model, "--shape", "tiny", "--contexts", "32", "--turns", "1", "--out", str(tmp_path / "page.md")]
    command = Command("skv_tools.bench.prefill", line, {}, tmp_path / "log")
    assert command.wait() == 0, command.printed
    lines = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| 32 |")]
    assert [line.split("|")[2].strip() for line in lines] == ["2 of 8", "4 of 8", "6 of 8"]
