"""`skv-convert`: both directions, what is exported in transformers and ONNX Runtime, and bad input."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from skv_tools.convert import run_engine

from skv_dist.checkpoint.folder import MANIFEST, digest
from skv_dist.routing import map_from_order
from skv_dist.routing.found import FORMAT
from tests.support.jobs.loop import run_training
from tests.support.settings import BASE, run_settings
from tests.tools.convert.hf_models import LAYERS, Call, make, save

MAPS = {
    "uniform": [0, 0, 2, 2, 4, 4, 6, 6],
    "irregular": [0, 0, 2, 3, 3, 3, 3, 3],
    "arbitrary": [0, 1, 0, 1, 4, 4, 4, 1],
}
GEMMA4 = {"block": "gemma4", "activation": "geglu", "qk_norm": True, "tie_embeddings": True}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("kind", "tied", "shard"),
    [
        ("llama", False, "20KB"),
        ("llama", True, "1GB"),
        ("qwen3", False, "1GB"),
        ("qwen3", True, "20KB"),
        ("mistral", False, "20KB"),
        ("mistral", True, "1GB"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bitwise(
    call: Call, tmp_path: Path, kind: str, tied: bool, shard: str, dtype: torch.dtype
) -> None:
    model = make(kind, tied, scaled=kind == "llama").to(dtype)
    save(model, tmp_path / "hf", shard)
    assert call("from-hf", tmp_path / "hf", tmp_path / "ours", "--tokenizer", "byte") == 0
    gigabytes = 20e3 / 2**30 if shard == "20KB" else 1
    asked = ("--full", "--architecture", kind, "--shard-gb", gigabytes, "--no-verify")
    assert call("to-hf", tmp_path / "ours", tmp_path / "back", *asked) == 0
    before, after = weights_of(tmp_path / "hf"), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == dtype for name in before)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1 or shard == "1GB"

    tokens = torch.arange(20)[None]
    with torch.no_grad():
        loaded = [type(model).from_pretrained(tmp_path / name, dtype=dtype).eval() for name in ("hf", "back")]
        assert torch.equal(loaded[0](tokens).logits, loaded[1](tokens).logits)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_trained_model_is_exported_from_any_layout(
    call: Call, workers: Any, text: Path, tmp_path: Path, tensor: int, pipeline: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on, from a Hugging Face folder; the export is compared with the checkpoint by `to-hf` itself."""
    save(make("llama", scaled=True), tmp_path / "hf")
    assert call("from-hf", tmp_path / "hf", tmp_path / "ours", "--tokenizer", "byte") == 0
    import yaml

    section = yaml.safe_load((tmp_path / "ours" / "model.yaml").read_text())["model"]
    given = run_settings(
        text,
        tmp_path / "run",
        train={"steps": 2},
        eval={"every": 2},
        checkpoint={"init_from": str(tmp_path / "ours")},
        parallel={"tensor": tensor, "pipeline": pipeline, "zero_stage": 1},
    )
    workers(tensor * pipeline)(run_training, {**given, "model": section})
    trained = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert call("to-hf", trained, tmp_path / "out", "--retention", 0.5) == 0
    assert "| transformers | 4 of 8 |" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 1.00 | 0.50 |" in card
    exported, start = weights_of(tmp_path / "out"), weights_of(tmp_path / "hf")
    assert not torch.equal(exported["lm_head.weight"], start["lm_head.weight"])
    kept = {name for name in start if not (("k_proj" in name or "v_proj" in name) and int(name.split(".")[2]) % 2)}
    assert exported.keys() == kept


@pytest.mark.parametrize("engine", ["transformers", "onnx"])
@pytest.mark.parametrize("name", MAPS)
def test_the_exported_model_is_the_checkpoint_under_its_map(
    call: Call, checkpoint: Path, tmp_path: Path, engine: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if engine == "onnx" and importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai has no wheel for this platform")
    out = tmp_path / "out"
    assert call("to-hf", checkpoint, out, "--kv-source-layers", *MAPS[name], "--no-verify") == 0
    assert call("verify", checkpoint, out, "--engine", engine) == 0
    assert f"{len(set(MAPS[name]))} of {LAYERS}" in capsys.readouterr().out

    config = json.loads((out / "config.json").read_text())
    wrong = list(config["kv_source_layers"])
    wrong[-1] = sorted(set(wrong))[0] if wrong[-1] else sorted(set(wrong))[-1]
    (out / "config.json").write_text(json.dumps({**config, "kv_source_layers": wrong}))
    # The runner is told another map than the one the reference gets.
    import numpy as np
    from skv_tools.convert.layerwise import checkpoint_log_probs
    from skv_tools.convert.reference import TEXT, comparison_tokens
    from skv_tools.convert.verify import largest_difference

    tokens, sources = comparison_tokens(out, TEXT, 32), tuple(MAPS[name])
    case = (sources, torch.float64)
    right = checkpoint_log_probs(checkpoint, tokens, [case], torch.float32)[case]
    np.save(tmp_path / "tokens.npy", tokens)
    measured = run_engine.run_engine(engine, sys.executable, out, tmp_path / "tokens.npy", tmp_path / "measured.npz")
    assert largest_difference(measured["prefill"], right) > 0.1


def test_loading_generating_and_an_adaptive_folder(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

    out = tmp_path / "adaptive"
    assert call("to-hf", checkpoint, out, "--adaptive") == 0

    def load(**given: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, **given).eval()

    def held(cache: Any) -> int:
        tensors = [getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values")]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)

    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert tokenizer("naïve 1+1", add_special_tokens=True)["input_ids"] == [b + 3 for b in "naïve 1+1".encode()]
    assert tokenizer.decode(tokenizer("naïve 1+1")["input_ids"]) == "naïve 1+1"
    tokens = torch.tensor([tokenizer("one layer reads")["input_ids"]] * 2)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    sizes = {}
    choices: dict[str, Any] = {"all": {}, "half": {"kv_retention": 0.5}}
    choices["map"] = {"kv_source_layers": MAPS["arbitrary"]}
    for name, given in choices.items():
        model = load(**given)
        cache, static = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)
        with torch.no_grad():
            whole = model(tokens).logits
            for kind in (cache, static):
                steps = [model(tokens[:, i : i + 1], past_key_values=kind).logits for i in range(tokens.shape[1])]
                torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)
            sizes[name] = held(cache), held(static)
            greedy = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)
            fixed = model.generate(
                tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation="static"
            )
            alone = model.generate(tokens[:1, 4:], max_new_tokens=8, do_sample=False)
            assert torch.equal(greedy, fixed)
            assert torch.equal(greedy[0, 4:], alone[0])  # padding on the left changes nothing
            for more in ({"num_beams": 3}, {"do_sample": True, "top_k": 5}):
                assert model.generate(tokens, attention_mask=mask, max_new_tokens=8, **more).shape == greedy.shape
    assert sizes["half"] == tuple(size / 2 for size in sizes["all"])
    assert sizes["map"] == tuple(size * 3 / 8 for size in sizes["all"])

    model = load(kv_retention=0.5)
    model.save_pretrained(tmp_path / "half")  # without the K/V that half of the layers do not need
    with pytest.raises(ValueError, match="layer 1 cannot own a cache"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "half", trust_remote_code=True, kv_retention=1.0)
    with pytest.raises(ValueError, match="not one of"):
        load(kv_source_layers=[0, 2, 2, 3, 4, 5, 6, 7])


def test_gemma4_blocks_load_in_stock_transformers(
    call: Call, workers: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained with random routes, over a pipeline; the suffix map is stock Gemma 4's own, and no code travels."""
    given = run_settings(
        text,
        tmp_path / "run",
        train={"steps": 2},
        parallel={"pipeline": 2, "tensor": 2, "zero_stage": 1},
        model={**GEMMA4, "init_std": 0.2},
        eval={"every": 0},
    )
    workers(4)(run_training, given)
    trained, out = tmp_path / "run" / "checkpoints" / "step_00000002", tmp_path / "out"
    layers = BASE["model"]["num_layers"]
    assert call("to-hf", trained, out, "--cached-layers", 0, 1, 2) == 0
    assert f"| transformers | 3 of {layers} |" in capsys.readouterr().out
    assert not list(out.glob("*.py"))
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["num_kv_shared_layers"]) == ("gemma4_text", layers - 3)
    assert not any("layers.3.self_attn.k_proj" in name for name in weights_of(out))
    assert call("to-hf", trained, tmp_path / "other", "--retention", 0.5) == 2
    assert "cannot be said in Gemma 4's architecture" in capsys.readouterr().err
    assert call("to-hf", trained, tmp_path / "other", "--adaptive") == 2
    assert "leave --adaptive and --architecture out" in capsys.readouterr().err


def test_an_engine_runs_in_an_interpreter_of_its_own(
    call: Call, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_engine, "subprocess", subprocess)
    assert call("to-hf", checkpoint, tmp_path / "out", "--kv-source-layers", *MAPS["irregular"]) == 0


def test_an_adaptive_folder_follows_the_order_that_a_search_found(
    call: Call, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    order = [0, 5, 2, 7, 1, 3, 6, 4]
    half = map_from_order(order, 0.5)
    entry = {"budget": 0.5, "layers": order[:4], "kv_source_layers": list(half), "rise": 0.0, "rise_error": 0.0}
    content = {
        "format": FORMAT,
        "fingerprint": digest(checkpoint / MANIFEST)["sha256"],
        "order": order,
        "budgets": [{**entry, "evenly_spread": {"loss": 0.0, "found_less_this": 0.0, "error": 0.0}}],
    }
    (tmp_path / "layers.json").write_text(json.dumps(content))
    asked = ["--from-search", tmp_path / "layers.json", "--budget", 0.5, "--adaptive"]
    assert call("to-hf", checkpoint, tmp_path / "out", *asked) == 0
    said = capsys.readouterr().out
    assert all(f"| transformers | {owners} of 8 |" in said for owners in (8, 4, 2))  # of the order, and compared
    for retention in (1.0, 0.7, 0.5, 0.3, 0.1):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, kv_retention=retention)
        assert model.config.sources == list(map_from_order(order, retention))
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True, kv_order=order[::-1], kv_retention=1)
    with pytest.raises(ValueError, match=r"kv_order must name each of 0\.\.7 once, and 0 first"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=True)


def projection_bytes(folder: Path) -> int:
    import onnx

    initializers = onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
    kept = [{pair.key: pair.value for pair in entry.external_data} for entry in initializers if "_proj" in entry.name]
    return sum(int(entry["length"]) for entry in kept)


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 0.51), ("int4", 0.2)])
def test_smaller_onnx_folders_are_compared_too(
    call: Call,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    largest: float,
) -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai has no wheel for this platform")
    from skv_tools.engines.export.onnx_genai import decoder

    assert call("to-hf", checkpoint, tmp_path / "out", "--kv-source-layers", *MAPS["arbitrary"], "--no-verify") == 0
    assert call("to-onnx", tmp_path / "out", tmp_path / "onnx", "--dtype", dtype) == 0
    said = capsys.readouterr().out
    assert "| onnx | 3 of 8 |" in said
    assert f"ONNX Runtime GenAI, {dtype}," in said
    assert call("to-onnx", tmp_path / "out", tmp_path / "wide", "--no-verify") == 0
    assert projection_bytes(tmp_path / "onnx") < largest * projection_bytes(tmp_path / "wide")
    weight = decoder.float32
    monkeypatch.setattr(decoder, "float32", lambda tensor: np.roll(weight(tensor), 1, axis=0))
    assert call("to-onnx", tmp_path / "out", tmp_path / "wrong", "--dtype", dtype) == 2
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(("tied", "width"), [(True, 32), (False, 32), (True, 48)])  # 48: the last block is not full
def test_embedding_and_head_are_kept_in_eight_bits(call: Call, tmp_path: Path, tied: bool, width: int) -> None:
    import onnx

    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai has no wheel for this platform")
    save(make("qwen3", tied=tied, layers=2, width=width), tmp_path / "hf")
    assert call("from-hf", tmp_path / "hf", tmp_path / "ours", "--tokenizer", "byte", "--no-verify") == 0
    assert call("to-hf", tmp_path / "ours", tmp_path / "out", "--retention", 0.5, "--no-verify") == 0
    assert call("to-onnx", tmp_path / "out", tmp_path / "onnx", "--dtype", "int4") == 0  # compared in the engine
    initializers = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.initializer
    of_vocabulary = {entry.name: entry for entry in initializers if entry.dims[0] == 262}
    places = {
        name: {pair.key: int(pair.value) for pair in entry.external_data if pair.key != "location"}
        for name, entry in of_vocabulary.items()
    }
    embedding = places["model.embed_tokens.weight"]
    assert embedding["length"] == 262 * width
    assert (places["lm_head.weight"] == embedding) == (tied and width == 32)  # the very same bytes
    wide = [name for name, entry in of_vocabulary.items() if entry.data_type == onnx.TensorProto.FLOAT]
    assert all(name.endswith("/scales") for name in wide)


@pytest.mark.parametrize("bits", [4, 8])
def test_few_bits_keep_the_largest_of_each_block_and_round_the_rest(bits: int) -> None:
    from skv_tools.engines.export.onnx_genai import rounded

    weight = np.random.default_rng(3).normal(size=(5, 70)).astype(np.float32)  # 70: the last block is not full
    weight[0, :32] = 0
    found, zero = rounded(weight, bits), 2 ** (bits - 1)
    assert (found[0, :32] == 0).all()
    for begin, end in ((0, 32), (32, 64), (64, 70)):
        of, to = weight[:, begin:end], found[:, begin:end]
        extreme = np.take_along_axis(of, np.abs(of).argmax(-1)[:, None], -1)
        assert np.take_along_axis(to, np.abs(of).argmax(-1)[:, None], -1) == pytest.approx(extreme)
        # Half a step inside; a whole one at the other end, where there is no code for it.
        assert (np.abs(to - of) <= np.abs(extreme) / zero * 1.001).all()
        inside = of * -np.sign(extreme) < np.abs(extreme) * (zero - 0.6) / zero
        assert (
            np.abs(to - of)[inside] <= (np.broadcast_to(np.abs(extreme), of.shape) / (2 * zero) * 1.001)[inside]
        ).all()


def test_what_is_written_for_onnx_is_compared(
    call: Call, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai has no wheel for this platform")
    from skv_tools.engines.export.onnx_genai import decoder

    assert call("to-hf", checkpoint, tmp_path / "out", "--kv-source-layers", *MAPS["arbitrary"], "--no-verify") == 0
    assert call("to-onnx", tmp_path / "out", tmp_path / "onnx") == 0
    assert "| onnx | 3 of 8 |" in capsys.readouterr().out
    tables = decoder.rotary_tables
    monkeypatch.setattr(decoder, "rotary_tables", lambda config: [table[:, ::-1] for table in tables(config)])
    assert call("to-onnx", tmp_path / "out", tmp_path / "wrong") == 2
    assert str(tmp_path / "wrong.failed") in capsys.readouterr().err
    assert (tmp_path / "wrong.failed" / "FAILED.md").exists()
    assert not (tmp_path / "wrong").exists()
