"""Families of models: from a folder of transformers and back, shared, and wrong on purpose."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from skv_tools.convert import layerwise
from skv_tools.convert.families import FAMILIES
from skv_tools.convert.from_hf import from_hf
from skv_tools.convert.stock import stock_architecture

from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError
from skv_dist.model.chunk import RoutedChunk
from skv_dist.model.layer import RoutedLayer
from skv_dist.model.norm import AllHeadsNorm, OffsetRMSNorm, RMSNorm
from skv_dist.routing import map_from_retention
from tests.tools.convert.family_cases import CASES
from tests.tools.convert.hf_models import Call, make, save

FULL = (0, 1, 2, 3)


def test_every_family_has_a_case() -> None:
    assert {case.kind for case in CASES.values()} | {"mistral", "qwen3"} == FAMILIES.keys()


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_and_shared(call: Call, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`from-hf` compares its result with the folder, and `to-hf` the export that shares with the checkpoint, both in
    transformers and in float64; the one that shares nothing is the folder again, bit by bit.

    With FAMILIES_TABLE=FILE in the environment a line for docs/families.md is added to that file.
    """
    case = CASES[name]
    save(case.model(), tmp_path / "hf")
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert call("from-hf", tmp_path / "hf", ours, "--tokenizer", "byte") == 0
    assert call("to-hf", ours, back, "--architecture", case.kind, "--no-verify") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    written, given = (json.loads((folder / "config.json").read_text()) for folder in (back, tmp_path / "hf"))
    assert written["model_type"] == given["model_type"]
    assert call("from-hf", back, tmp_path / "again", "--tokenizer", "byte", "--no-verify") == 0
    model, again = (layerwise.config_of(folder).model for folder in (ours, tmp_path / "again"))
    assert model == again
    retention = 0.5 if len(set(model.layer_kinds)) == 1 else 0.25
    sources = map_from_retention(4, retention, model.layer_kinds)
    assert sources != FULL
    assert call("to-hf", ours, tmp_path / "shared", "--kv-source-layers", *sources) == 0
    found = re.findall(r"\| transformers \| (\d of \d) \| (\S+) \| (\S+)", capsys.readouterr().out)
    (_, *imported), (owners, *shared) = found
    if "FAMILIES_TABLE" in os.environ:
        largest = [max(figures, key=float) for figures in (imported, shared)]
        with open(os.environ["FAMILIES_TABLE"], "a", encoding="utf-8") as table:
            table.write(f"| {name} | {largest[0]} | bit by bit | {owners} | {largest[1]} |\n")


def test_an_engine_refuses_what_it_does_not_carry(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(CASES["qwen2"].model(), tmp_path / "hf")
    assert call("from-hf", tmp_path / "hf", tmp_path / "ours", "--tokenizer", "byte", "--no-verify") == 0
    assert call("to-hf", tmp_path / "ours", tmp_path / "out", "--retention", 0.5, "--no-verify") == 0
    assert "does not carry block.biases." in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    assert call("to-onnx", tmp_path / "out", tmp_path / "onnx") == 2
    printed = capsys.readouterr().err
    assert "block.biases is ['qkv'], which the ONNX graph written here does not carry" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--kv-source-layers", 0, 0, 2, 3], "the nearest map that may be is 0 1 2 3"),
        (["--adaptive"], "--adaptive is for models whose layers are of one kind"),
        (["--architecture", "llama"], "it cannot say model.biases ['qkv']: this model can be qwen2"),
    ],
)
def test_what_kinds_or_families_rule_out_is_refused(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[Any], message: str
) -> None:
    options = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    model = make("qwen2", layers=4, use_sliding_window=True, sliding_window=8, **options)
    from_hf(save(model, tmp_path / "hf"), tmp_path / "ours", "byte")
    capsys.readouterr()
    assert call("to-hf", tmp_path / "ours", tmp_path / "out", *asked) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def _log_probs(model: Any, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return torch.log_softmax(model(tokens).logits.double(), -1).numpy()


def _swapped_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RoutedLayer.forward

    def wrong(self: Any, *args: Any) -> Any:
        def swap() -> None:
            self.input_layernorm, self.post_attention_norm = self.post_attention_norm, self.input_layernorm

        swap()
        try:
            return right(self, *args)
        finally:
            swap()

    monkeypatch.setattr(RoutedLayer, "forward", wrong)


def _norm_of_each_head(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, heads: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(heads, heads.shape[-1:]) * self.weight.view(heads.shape[-2:])

    monkeypatch.setattr(AllHeadsNorm, "forward", wrong)


def _norm_not_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OffsetRMSNorm, "forward", RMSNorm.forward)


def _embedding_not_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoutedChunk, "_embedding_factor", lambda self, dtype: 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"qk_norm": True, "logit_divisor": 2.0}, "qwen3, cannot say model.logit_divisor 2.0; with --adaptive the"),
        ({"qk_norm": True, "no_rope_layers": [3]}, "cannot say model.no_rope_layers [3]; with a map in which layers"),
        ({"block": "gemma", "activation": "geglu", "score_scale": 0.3}, "gemma2, cannot say model.score_scale 0.3"),
    ],
)
def test_what_no_architecture_has_is_named(given: dict[str, Any], message: str) -> None:
    """And only a way that is open: an adaptive folder has layers of one kind."""
    sizes = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_kv_heads": 2}
    with pytest.raises(UserError, match=re.escape(message)):
        stock_architecture(ModelConfig.model_validate({**sizes, "vocab_size": 64, **given}), None)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("llama-biases", {"biases": ["attention_output", "mlp"]}),
        ("llama-biases", {"biases": ["qkv", "mlp"]}),
        ("llama-biases", {"biases": ["qkv", "attention_output"]}),
        ("llama-linear", {"rope_scaling": None}),
        ("llama-yarn", {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32}}),
        ("llama-longrope-long", {"rope_theta": 9000.0}),
        ("qwen2", {"biases": []}),
        ("mistral-windows", {"sliding_window": 9}),
        ("qwen2-windows", {"sliding_window": 7}),
        ("qwen2-windows", {"sliding_layers": [1, 2]}),
        ("qwen2-windows", {"sliding_rope_theta": 500.0}),
        ("smollm3", {"no_rope_layers": [0, 2]}),
        ("granite", {"embedding_scale": 1.0}),
        ("granite", {"residual_scale": 1.0}),
        ("granite", {"score_scale": None}),
        ("granite", {"logit_divisor": 1.0}),
        ("olmo2", _swapped_norms),
        ("olmo2", _norm_of_each_head),
        ("olmo3", {"sliding_rope_theta": None}),
        ("gemma2", {"score_cap": None}),
        ("gemma2", {"logit_cap": None}),
        ("gemma2", {"score_scale": None}),
        ("gemma3", {"sliding_rope_theta": 10000.0}),
        ("gemma3", _norm_not_from_one),
        ("gemma3", _embedding_not_scaled),
    ],
)
def test_wrong_on_purpose_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    """One entry of the table at a time says something else, of the same weights."""
    model = CASES[name].model()
    from_hf(save(model, tmp_path / "hf"), tmp_path / "ours", "byte")
    tokens = torch.randint(3, 262, (1, 40), generator=torch.Generator().manual_seed(1))
    theirs, config_of = _log_probs(model, tokens), layerwise.config_of

    def difference() -> float:
        cases = [(FULL, torch.float32)]
        found = layerwise.checkpoint_log_probs(tmp_path / "ours", tokens.numpy(), cases, torch.float32)
        return float(np.abs(found[FULL, torch.float32] - theirs).max())

    assert difference() < 1e-4
    if callable(wrong):
        wrong(monkeypatch)
    else:

        def changed(*args: Any) -> Any:
            run = config_of(*args)
            section = ModelConfig.model_validate({**run.model.model_dump(), **wrong})
            return run.model_copy(update={"model": section})

        monkeypatch.setattr(layerwise, "config_of", changed)
    assert difference() > 1e-2
