"""`skv-convert from-hf` of a model on the hub, and of GGUF."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from skv_tools.convert.brought import brought
from tokenizers.pre_tokenizers import ByteLevel

from skv_dist.checkpoint.load import read_tensors, tensor_shapes
from tests.tools.convert.hf_models import Call, make, save, words_tokenizer

NAME, COMMIT = "owner/model", "0123456789abcdef0123456789abcdef01234567"


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return read_tensors(checkpoint, [name for name in tensor_shapes(checkpoint) if name.startswith("model.")])


def assert_same_weights(checkpoint: Path, other: Path) -> None:
    found, expected = weights(checkpoint), weights(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, without a network."""
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


def test_a_model_of_the_hub_is_taken_from_there(
    call: Call, tmp_path: Path, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(make("llama"), tmp_path / "hf")
    words_tokenizer().save_pretrained(source)
    of_model = hub / "models--owner--model"
    shutil.copytree(source, of_model / "snapshots" / COMMIT)
    (of_model / "refs").mkdir()
    (of_model / "refs" / "main").write_text(COMMIT)
    assert call("from-hf", source, "local", "--no-verify") == 0
    assert call("from-hf", NAME, "ours") == 0
    assert f"{NAME}: there is no such folder; taken from the Hugging Face hub" in capsys.readouterr().err
    assert json.loads(Path("ours/origin.json").read_text())["base_model"] == NAME
    assert_same_weights(Path("ours"), Path("local"))


def test_of_a_model_on_the_hub_its_weights_come_once_and_its_card_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, list[str]] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **patterns: asked.update(patterns) or ".")
    with brought(NAME, Path()) as (_, hub_name):
        assert hub_name == NAME
    wanted = [
        *("README.md", "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "merges.txt"),
        *("model.safetensors.index.json", "tokenizer.model", "chat_template.jinja"),
    ]
    others = ["consolidated.safetensors", "original/consolidated.00.pth", "original/params.json", "pytorch_model.bin"]
    assert list(filter_repo_objects([*wanted, *others, "onnx/model.onnx"], **asked)) == wanted


@pytest.mark.parametrize("name", [NAME, "./owner/model", "owner/model/"])
def test_what_is_neither_folder_nor_on_the_hub_is_refused(
    call: Call, tmp_path: Path, hub: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert call("from-hf", name, "ours") == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert ("cannot be had from the hub" if name == NAME else "is not a folder") in last
    assert not list(tmp_path.iterdir())


def write_gguf(source: Path, file: Path) -> None:
    """A Llama of transformers in float32, by the names and the order of rows that llama.cpp has."""
    import gguf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    words = [*sorted(ByteLevel.alphabet()), "wo"]  # as gpt2 writes bytes, and one merge
    words += [f"word{number}" for number in range(config.vocab_size - 3 - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "<s>", "</s>", *words])
    writer.add_token_types([3, 3, 3, *[1] * len(words)])
    writer.add_token_merges(["w o"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        count = next((count for part, count in heads.items() if part in name), None)
        if count is not None:  # pairs of a rotation lie side by side there
            value = value.view(count, 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_widened(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    source = save(make("llama"), tmp_path / "hf")
    (tmp_path / "files").mkdir()
    write_gguf(source, tmp_path / "files" / "small.gguf")
    before = sorted(tmp_path.iterdir())
    assert call("from-hf", source, tmp_path / "expected", "--tokenizer", "byte", "--no-verify") == 0
    for given, out in (("files/small.gguf", "one"), ("files", "other")):
        assert call("from-hf", tmp_path / given, tmp_path / out) == 0, capsys.readouterr().err
        assert_same_weights(tmp_path / out, tmp_path / "expected")
        assert json.loads((tmp_path / out / "origin.json").read_text())["folder"] == "small"
    made = {tmp_path / name for name in ("expected", "one", "other")}
    assert sorted(set(tmp_path.iterdir()) - made) == before
    shutil.copy(tmp_path / "files" / "small.gguf", tmp_path / "files" / "again.gguf")
    assert call("from-hf", tmp_path / "files", tmp_path / "out") == 2
    assert "holds 2 files of GGUF: name one, such as" in capsys.readouterr().err


def test_gguf_that_is_none_and_a_missing_package_are_said(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    pytest.importorskip("gguf")
    assert call("from-hf", tmp_path / "model.gguf", tmp_path / "out") == 2
    assert "model.gguf cannot be read by transformers: " in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert call("from-hf", tmp_path / "model.gguf", tmp_path / "out") == 2
    assert "needs the package gguf: pip install 'skv-dist[gguf]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
