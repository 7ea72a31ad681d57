"""`skv-convert`: bad input is one line, and leaves nothing behind."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.tools.convert.hf_models import Call, make, save


def test_what_cannot_be_exported_is_refused_in_one_line(
    call: Call, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        ("--kv-source-layers", 0, 2, 2, 3, 4, 5, 6, 7): "kv_source_layers[1] is 2",
        ("--kv-source-layers", 0, 0, 1, 3, 4, 5, 6, 7): "layer 1 keeps no cache of its own",
        ("--kv-source-layers", 0, 0): "2 entries for a model of 8 layers",
        ("--cached-layers", 1, 2): "must contain layer 0",
        ("--retention", 0): "must lie in (0, 1]",
        ("--full", "--architecture", "llama"): "can be qwen3",
        ("--tokens", 1): "--tokens must be at least 2",
    }
    for asked, message in cases.items():
        assert call("to-hf", checkpoint, tmp_path / "out", *asked) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())  # nothing half written
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()  # none is left for the next process
    assert call("to-hf", tmp_path / "none", tmp_path / "out") == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"model_type": "qwen2_moe"}, "(the nearest is 'qwen2')"),
        ({"attention_bias": True}, "has no tensor model.layers.0.self_attn.q_proj.bias"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_type is 'proportional'"),
        ({"layer_types": ["chunked_attention"] * 8}, "layer_types is ['chunked_attention'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"intermediate_size": 64}, "is [48, 32], but config.json makes it [64, 32]"),
        ({"num_hidden_layers": 9, "layer_types": None}, "has no tensor model.layers.8"),
        ({"num_hidden_layers": 7, "layer_types": None}, "model.layers.7"),
        ({"num_hidden_layers": 7}, "`num_hidden_layers` (7) must be equal to the number of `layer_types` (8)"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_field(
    call: Call, tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(make("qwen3"), tmp_path / "hf")
    config = {**json.loads((source / "config.json").read_text()), **change}
    config = {key: value for key, value in config.items() if value is not None or key not in change}
    (source / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert call("from-hf", source, tmp_path / "ours", "--tokenizer", "byte") == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_damaged_folders_are_named(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(make("llama"), tmp_path / "hf", "20KB")
    _, two, *_ = sorted(source.glob("*.safetensors"))
    two.write_bytes(b"\xff" * 100)
    assert call("from-hf", source, tmp_path / "ours", "--tokenizer", "byte") == 2
    assert f"{two}: it cannot be read" in capsys.readouterr().err
    two.unlink()
    assert call("from-hf", source, tmp_path / "ours", "--tokenizer", "byte") == 2
    assert f"{two}: it is missing" in capsys.readouterr().err
    for path in source.glob("*.safetensors*"):
        path.unlink()
    assert call("from-hf", source, tmp_path / "ours", "--tokenizer", "byte") == 2
    assert "only safetensors are read" in capsys.readouterr().err
    source = save(make("llama"), tmp_path / "whole")
    assert call("from-hf", source, tmp_path / "ours") == 2
    assert "holds no tokenizer" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "whole"}


def test_what_the_onnx_runtime_refuses_is_refused_before_anything_is_written(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(make("llama", layers=2), tmp_path / "hf")
    assert call("from-hf", tmp_path / "hf", tmp_path / "ours", "--tokenizer", "byte", "--no-verify") == 0
    assert call("to-hf", tmp_path / "ours", tmp_path / "out", "--adaptive", "--no-verify") == 0
    assert call("to-hf", tmp_path / "ours", tmp_path / "stock", "--no-verify") == 0
    before = sorted(path.name for path in tmp_path.iterdir())
    for given, message in {
        "out": "head_dim is 8, but ONNX Runtime's GroupQueryAttention",
        "stock": "holds a 'llama' model",
        "ours": "is a checkpoint: `skv-convert to-hf",
        "gone": "gone is not a folder",
    }.items():
        capsys.readouterr()
        assert call("to-onnx", tmp_path / given, tmp_path / "deep" / "onnx") == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_of_another_kind_is_named(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(make("llama", layers=2), tmp_path / "hf")
    capsys.readouterr()
    assert call("to-hf", tmp_path / "hf", tmp_path / "out") == 2
    assert "it is a Hugging Face folder; `skv-convert from-hf" in capsys.readouterr().err
    assert call("verify", tmp_path / "hf", tmp_path / "hf") == 2
    assert "it is a Hugging Face folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "files", "message"),
    [
        ("model.gguf", [], "model.gguf is a GGUF file: `skv-convert from-hf` makes"),
        ("folder", ["model.gguf"], "folder holds GGUF and no config.json: `skv-convert from-hf` makes"),
        ("run", ["checkpoints/latest"], "run is the folder of a run: `skv-convert to-hf"),
        ("onnx", ["genai_config.json"], "onnx is a folder for ONNX Runtime GenAI"),
        ("list.txt", [], "list.txt is a file, not a folder"),
        ("empty", ["README.md"], "config.json: No such file"),
    ],
)
def test_what_is_no_folder_of_transformers_is_named(
    call: Call,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: str,
    files: list[str],
    message: str,
) -> None:
    for name in files:
        (tmp_path / given / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / given / name).touch()
    if not files:
        (tmp_path / given).touch()
    lines = [["to-onnx"], ["verify", checkpoint]]
    for line in lines if "GGUF" in message else [["from-hf"], *lines]:
        arguments = [tmp_path / given] if line[0] == "verify" else [tmp_path / given, tmp_path / "out"]
        assert call(*line, *arguments) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [given]


def test_a_name_of_the_hub_is_not_looked_up(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("to-onnx", "someone/model", tmp_path / "out") == 2
    assert "comes by `hf download someone/model`, or by `skv-convert from-hf`" in capsys.readouterr().err
