"""Adapters in checkpoints: trained on a model of Hugging Face, resumed in another layout, merged on export, and read by
peft."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.jobs.checkpoint import run_and_report
from tests.support.runs import lines_of
from tests.support.settings import run_settings
from tests.tools.convert.hf_models import Call, make, save


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from skv_tools.convert.from_hf import from_hf

    folder = tmp_path_factory.mktemp("llama")
    from_hf(save(make("llama", scaled=True), folder / "hf"), folder / "ours", "byte")
    return folder


def settings(text: Path, base: Path, out: Path, lora: dict[str, Any], **sections: Any) -> dict[str, Any]:
    given = run_settings(
        text,
        out,
        train={"steps": 4},
        eval={"every": 4},
        optimizer={"lr": 0.02},
        checkpoint={"init_from": str(base / "ours"), "every": 2, "keep_last": None},
        **sections,
    )
    return {**given, "model": yaml.safe_load((base / "ours" / "model.yaml").read_text())["model"], "lora": lora}


@pytest.fixture(scope="module")
def trained(workers: Any, text: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters, over two tensor-parallel ranks."""
    out = tmp_path_factory.mktemp("adapters") / "run"
    given = settings(text, base, out, {"rank": 2, "alpha": 8}, parallel={"tensor": 2})
    printed, error = workers(2)(run_and_report, given, [])[0]
    assert error is None
    assert "of them frozen" in printed
    return out


def test_resuming_in_another_layout_goes_on_the_same(
    workers: Any, text: Path, base: Path, trained: Path, tmp_path: Path
) -> None:
    start = trained / "checkpoints" / "step_00000002"
    given = settings(text, base, tmp_path / "run", {"rank": 2, "alpha": 8}, parallel={"pipeline": 2})
    given["checkpoint"] = {"resume": str(start)}
    assert workers(2)(run_and_report, given, [])[0][1] is None
    found, expected = lines_of(tmp_path / "run"), lines_of(trained)[2:]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    assert expected[-1]["loss"] != lines_of(trained)[0]["loss"]


@pytest.mark.parametrize("lora", [{"rank": 0}, {"rank": 4}, {"rank": 2, "alpha": 16}], ids=str)
def test_adapters_are_not_lost_without_a_word(
    workers: Any, text: Path, base: Path, trained: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    given = settings(text, base, tmp_path / "run", lora)
    given["checkpoint"]["init_from"] = str(trained / "checkpoints" / "step_00000004")
    _, error = workers(1)(run_and_report, given, [])[0]
    assert error is not None
    assert "has adapters (lora.rank 2) that this run has not" in error


def test_exports_hold_the_sums_and_peft_reads_the_adapters(
    call: Call, base: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`to-hf` compares with the checkpoint's own layers; then peft's sums are compared with the export."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert call("to-hf", trained, tmp_path / "merged", "--full") == 0
    assert call("to-peft", trained, tmp_path / "peft") == 0
    assert "adapters of " in capsys.readouterr().out
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 8)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(base / "hf", dtype=torch.float32)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        wanted, before = merged(tokens).logits, start(tokens).logits
        found = PeftModel.from_pretrained(start, tmp_path / "peft").eval()(tokens).logits
    assert (wanted - before).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    names = set(load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert len(names) == 2 * 7 * start.config.num_hidden_layers


def test_a_checkpoint_without_adapters_is_refused(
    call: Call, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("to-peft", base / "ours", tmp_path / "peft") == 2
    assert "has no adapters (lora.rank is 0)" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()
