"""`skv-convert from-hf`: folders that say two things, leave something unsaid, or say more than weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from skv_tools.convert.hf_config import complete, model_section

from skv_dist.errors import UserError
from tests.tools.convert.hf_models import LLAMA3, Call, make, save, words_tokenizer


def _changed(folder: Path, file: str = "config.json", **changes: object) -> Path:
    """``folder`` with other fields in a JSON file; None takes one out."""
    path = folder / file
    fields = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return folder


def _logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits


TOKENS = torch.arange(3, 40)[None]


def _there_and_back(call: Call, source: Path, work: Path) -> Path:
    assert call("from-hf", source, work / "ours", "--tokenizer", "byte") == 0
    assert call("to-hf", work / "ours", work / "back", "--no-verify") == 0
    return work / "back"


def test_a_head_of_its_own_is_kept_whatever_the_config_says(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _changed(save(make("llama"), tmp_path / "hf"), tie_word_embeddings=True)
    back = _there_and_back(call, source, tmp_path)
    assert "lm_head.weight differs from the embedding" in capsys.readouterr().err
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(_logits(back, TOKENS), _logits(source, TOKENS))


def test_a_head_that_repeats_the_embedding_is_left_out(call: Call, tmp_path: Path) -> None:
    source = save(make("llama", tied=True), tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    back = _there_and_back(call, source, tmp_path)
    assert "lm_head.weight" not in load_file(back / "model.safetensors")
    torch.testing.assert_close(_logits(back, TOKENS), _logits(source, TOKENS))


def test_of_a_file_and_a_stale_index_the_file_is_read(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(make("llama", scaled=True), tmp_path / "hf", "20KB")
    model = make("llama")
    with torch.no_grad():
        model.model.norm.weight *= -1
    save(model, tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").rename(source / "model.safetensors")
    back = _there_and_back(call, source, tmp_path)
    assert "model.safetensors.index.json beside it" in capsys.readouterr().err
    torch.testing.assert_close(_logits(back, TOKENS), _logits(source, TOKENS))


def test_llama3_scaling_without_its_original_context(call: Call, tmp_path: Path) -> None:
    scaling = {key: value for key, value in LLAMA3.items() if "original" not in key}
    source = _changed(save(make("llama"), tmp_path / "hf"), rope_parameters=scaling)
    back = _there_and_back(call, source, tmp_path)
    written = json.loads((back / "config.json").read_text())["rope_parameters"]
    assert written["original_max_position_embeddings"] == 128
    torch.testing.assert_close(_logits(back, TOKENS), _logits(source, TOKENS))


NEEDED = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 32,
    "vocab_size": 100,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("llama", {}, {"num_kv_heads": 32, "head_dim": 2}),
        ("llama", {"num_key_value_heads": None}, {"num_kv_heads": 32}),
        ("llama", {"head_dim": 8}, {"head_dim": 8}),
        ("mistral", {"sliding_window": None}, {"num_kv_heads": 8, "head_dim": 2}),
        ("mistral", {"sliding_window": 8192}, {"num_kv_heads": 8, "sliding_window": None, "sliding_layers": []}),
        ("mistral", {}, {"sliding_window": 4096, "sliding_layers": [0, 1]}),
        ("mistral", {"sliding_window": 4096}, {"sliding_window": 4096, "sliding_layers": [0, 1]}),
        ("qwen2", {}, {"sliding_window": None, "biases": ["qkv"]}),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 1},
            {"sliding_window": 4096, "sliding_layers": [1]},
        ),
        ("smollm3", {}, {"no_rope_layers": [], "rope_theta": 2e6, "tie_embeddings": True}),
        ("smollm3", {"no_rope_layer_interval": 2}, {"no_rope_layers": [1]}),
        (
            "olmo3",
            {"layer_types": ["full_attention"] * 2, "rope_parameters": None},
            {"sliding_window": None, "sliding_layers": [], "rope_theta": 5e5},
        ),
        ("granite", {}, {"score_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "logit_divisor": 1.0}),
        ("phi3", {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None, "sliding_window": None}),
        ("llama", {"attention_bias": True}, {"biases": ["qkv", "attention_output"]}),
        ("llama", {"mlp_bias": True}, {"biases": ["mlp"]}),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        ("qwen3", {}, {"num_kv_heads": 32, "head_dim": 128}),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": False}, {"qk_norm": True}),
        ("llama", {"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ("llama", {"rope_scaling": {"type": "default"}, "rope_theta": 7}, {"rope_theta": 7, "rope_scaling": None}),
        ("llama", {"rope_scaling": None}, {"rope_theta": 10000.0}),
        ("llama", {"tie_word_embeddings": True}, {"tie_embeddings": True}),
        ("llama", {"initializer_range": 0.5}, {"init_std": 0.5}),
        ("llama", {"rms_norm_eps": 9.999999747378752e-06}, {"norm_eps": 1e-5}),  # from a GGUF file, in float32
        ("llama", {"rms_norm_eps": 1.0000001e-05}, {"norm_eps": 1.0000001e-05}),
    ],
)
def test_what_is_not_said_is_as_in_transformers(kind: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    section = model_section(complete({"model_type": kind, **NEEDED, **given}))
    assert {key: section[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("mistral", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_type is 'dynamic', but factor is missing"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "but short_factor is missing"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_parameters.factor"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta": 1}}, "beta among the settings"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": "2"}}, "factor is '2'"),
        (
            "llama",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 2, "long_factor": [1.0]}},
            "short_factors has 2 entries, but half of head_dim is 1",
        ),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers is [1]"),
        # transformers would take this window, whatever use_sliding_window says
        ("smollm3", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 2}, "layer_types is"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention among the settings"),
        ("llama", {"rope_scaling": {"type": "default", "mrope_section": [1, 1]}}, "mrope_section among the settings"),
        ("llama", {"rope_scaling": "llama3"}, "rope_scaling is 'llama3'"),
        ("llama", {"rope_scaling": {**LLAMA3, "factor": None}}, "rope_type is 'llama3', but factor is missing"),
        ("llama", {"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"compression_config": {"format": "int8"}}, "compression_config"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
        ("llama", {"num_key_value_heads": 5}, "not divisible by num_kv_heads"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("llama", {"num_hidden_layers": 2.5}, "config.json: "),
        ("llama", {"hidden_size": "64"}, "hidden_size is '64'"),
        ("llama", {"vocab_size": None}, "vocab_size is missing"),
        ("gpt2", {}, "model_type is 'gpt2'"),
    ],
)
def test_what_cannot_be_represented_is_named(kind: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"config\.json") as caught:
        model_section(complete({"model_type": kind, **NEEDED, **given}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_weights_that_do_not_fit_are_named(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str) -> None:
        assert call("from-hf", source, tmp_path / "deep" / "ours", "--tokenizer", "byte") == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]  # nor the folder that was to hold it

    source = save(make("llama"), tmp_path / "hf", "20KB")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, second = list(dict.fromkeys(content["weight_map"].values()))[:2]
    capsys.readouterr()
    index.write_text(json.dumps({**content, "weight_map": {**content["weight_map"], "model.norm.weight": first}}))
    refused(f"says that model.norm.weight is in {first}, which does not hold it")
    index.write_text(json.dumps({**content, "weight_map": {"model.norm.weight": f"../{second}"}}))
    refused("which is no file beside it")
    index.unlink()
    refused("model.safetensors.index.json, which lists such files, is missing")
    for file in source.glob("*.safetensors"):
        file.unlink()
    weights = dict(make("llama").state_dict())
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.2.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, source / "model.safetensors")
    refused("tensor model.layers.2.mlp.up_proj.weight is I8")


def test_a_chat_model_still_knows_where_to_stop(call: Call, tmp_path: Path) -> None:
    """From a folder over a start, a run and its checkpoint to an exported folder; nothing is looked up in the first."""
    from transformers import AutoTokenizer, GenerationConfig

    from skv_dist.checkpoint.travelling import origin_of, travelling_files
    from skv_dist.data.tokenizer import load_tokenizer

    source = save(make("llama"), tmp_path / "hf")
    words_tokenizer().save_pretrained(source)
    said = {"bos_token_id": 0, "eos_token_id": [1, 61], "pad_token_id": 2, "do_sample": True, "temperature": 0.6}
    _changed(source, "generation_config.json", **said, top_p=0.9)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    _changed(source, _name_or_path="someone/chat-model")
    start = tmp_path / "ours"
    assert call("from-hf", source, start) == 0
    named = yaml.safe_load((start / "model.yaml").read_text())["data"]["tokenizer"]
    assert named == str(start / "tokenizer")
    source.rename(tmp_path / "moved")
    carried = travelling_files(load_tokenizer(named), start)  # by a run that begins with it
    assert {"origin.json", "tokenizer/tokenizer.json", "tokenizer/chat_template.jinja"} <= carried.keys()
    assert json.loads(carried["origin.json"]) == origin_of(start)

    assert call("to-hf", start, tmp_path / "out", "--retention", 0.5, "--no-verify") == 0
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: kept[key] for key in said} == said
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 61]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [1, 61]
    again = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    asked = again.apply_chat_template([{"role": "user", "content": "w5 w6"}], tokenize=False)
    assert asked == "user w5 w6"
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "someone/chat-model"
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "apply_chat_template" in card


def test_ids_of_another_tokenizer_are_not_kept(call: Call, tmp_path: Path) -> None:
    source = save(make("llama"), tmp_path / "hf")
    _changed(source, "generation_config.json", eos_token_id=[7, 8], temperature=0.5)
    back = _there_and_back(call, source, tmp_path)
    kept = json.loads((back / "generation_config.json").read_text())
    assert (kept["eos_token_id"], kept["temperature"]) == (1, 0.5)


def test_a_generation_config_that_cannot_be_read_is_named(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(make("llama", layers=2), tmp_path / "hf")
    for content in ('{"eos_token_id": ["<e>"]}', "[]", "{"):
        (source / "generation_config.json").write_text(content)
        capsys.readouterr()
        assert call("from-hf", source, tmp_path / "ours", "--tokenizer", "byte") == 2
        assert "generation_config.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
