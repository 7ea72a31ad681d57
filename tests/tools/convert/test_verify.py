"""Which exports `skv-convert` takes for right, and which not; and what becomes of those."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from skv_tools.convert import layerwise, to_hf, verify
from skv_tools.convert.findings import FLOAT32_LIMIT, FLOAT64_LIMIT, first_problem
from skv_tools.convert.from_hf import from_hf
from skv_tools.convert.layerwise import checkpoint_log_probs
from skv_tools.convert.reference import TEXT, comparison_tokens
from skv_tools.convert.to_hf import Export, write_folder

from tests.tools.convert.hf_models import LAYERS, Call, make, make_with_outliers, save

HALF = tuple(layer - layer % 2 for layer in range(LAYERS))
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a few very large activations, as trained models have them, converted to ours."""
    folder = tmp_path_factory.mktemp("outliers")
    from_hf(save(make_with_outliers(), folder / "hf"), folder / "ours", "byte")
    return folder / "ours"


@pytest.fixture(scope="module")
def exported(outliers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    out.mkdir()
    write_folder(outliers, out, Export(HALF))
    return out


def test_rounding_of_a_model_with_outliers_passes(outliers: Path, exported: Path) -> None:
    tokens = comparison_tokens(exported, TEXT, 64)
    cases = [(HALF, torch.float64), (HALF, torch.float32)]
    wide, narrow = checkpoint_log_probs(outliers, tokens, cases, torch.float32).values()
    noise = verify.largest_difference(wide, narrow)
    assert noise > 3 * FLOAT32_LIMIT  # float32 alone is further off than a fixed limit would allow
    [found] = verify.verify(outliers, exported, "transformers")
    assert found.problem() is None
    assert max(found.prefill, found.stepwise) < FLOAT64_LIMIT / 100
    assert found.wrong_map is not None
    assert found.wrong_map > 1


def _config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _weights(change: Callable[[Weights], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")

    return apply


def _swap_layers(weights: Weights) -> None:
    for name in [name for name in weights if name.startswith("model.layers.3.")]:
        other = name.replace("layers.3.", "layers.5.")
        weights[name], weights[other] = weights[other], weights[name]


def _swap_norms(weights: Weights) -> None:
    one, other = (f"model.layers.4.{name}_layernorm.weight" for name in ("input", "post_attention"))
    weights[one], weights[other] = weights[other], weights[one]


def _interleave(weights: Weights) -> None:
    """Rotary positions over neighbours instead of halves: the other of the two conventions."""
    for part in "qk":
        name = f"model.layers.2.self_attn.{part}_proj.weight"
        rows, hidden = weights[name].shape
        halves = weights[name].view(-1, 2, 4, hidden)  # [heads, halves, pairs, hidden]
        weights[name] = halves.transpose(1, 2).reshape(rows, hidden)


def _flip(weights: Weights) -> None:
    weights["model.layers.6.mlp.up_proj.weight"] *= -1


def _flip_one_row(weights: Weights) -> None:
    weights["model.layers.6.self_attn.v_proj.weight"][3] *= -1


FAULTS: dict[str, Callable[[Path], None]] = {
    "another map": lambda folder: _config(folder, kv_source_layers=[0, 0, 2, 2, 4, 4, 6, 4]),
    "another epsilon of norms": lambda folder: _config(folder, rms_norm_eps=1e-5),
    "norms swapped": _weights(_swap_norms),
    "another base of positions": lambda folder: _config(
        folder, rope_parameters={"rope_type": "default", "rope_theta": 10100.0}
    ),
    "positions over neighbours": _weights(_interleave),
    "layers swapped": _weights(_swap_layers),
    "a tensor flipped": _weights(_flip),
    "a row flipped": _weights(_flip_one_row),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_export_is_refused(
    outliers: Path, exported: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_unshared_bytes", lambda *_: 2 * 2 * 2 * 8 * 4.0 * LAYERS / 2)
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    FAULTS[fault](folder)
    problem = first_problem(verify.verify(outliers, folder, "transformers", asked=HALF))
    assert problem is not None
    assert "log-probabilities differ" in problem


def test_positions_that_fall_behind_while_decoding_are_seen(outliers: Path, exported: Path) -> None:
    """A cache that counts wrongly: prefill is right, the tokens behind it stand one place too early."""
    from skv_tools.engines.runners import run_transformers as runner
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    tokens = comparison_tokens(exported, TEXT, 32)
    case = (HALF, torch.float64)
    right = checkpoint_log_probs(outliers, tokens, [case], torch.float32)[case]
    runner.compute_in(model, torch.float64)
    with torch.inference_mode(), runner.StayWide():
        measured = runner.log_probs(model, torch.from_numpy(tokens))
        assert verify.largest_difference(measured["stepwise"], right) < FLOAT64_LIMIT
        rotary = model.model.rotary_emb.forward
        model.model.rotary_emb.forward = lambda x, position_ids: rotary(
            x, position_ids=position_ids - int(position_ids.shape[1] == 1)
        )
        measured = runner.log_probs(model, torch.from_numpy(tokens))
    assert verify.largest_difference(measured["prefill"], right) < FLOAT64_LIMIT
    assert verify.largest_difference(measured["stepwise"], right) > 1e3 * FLOAT64_LIMIT


def test_a_failed_export_is_kept_beside(
    call: Call, outliers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = to_hf.split
    monkeypatch.setattr(to_hf, "split", lambda *given: [-part for part in split(*given)])
    for kept in ("out.failed", "out.failed.2"):
        assert call("to-hf", outliers, tmp_path / "out", "--retention", 0.5) == 2
        printed = capsys.readouterr().err
        assert "log-probabilities differ by" in printed
        assert str(tmp_path / kept) in printed
        report = (tmp_path / kept / "FAILED.md").read_text()
        assert "| transformers | 4 of 8 |" in report
        assert f"skv-convert verify {outliers} {tmp_path / kept}" in report
        assert (tmp_path / kept / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.failed", "out.failed.2"]


def test_an_export_that_could_not_be_compared_is_kept_beside(
    call: Call, outliers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(verify, "checkpoint_log_probs", no_memory)
    assert call("to-hf", outliers, tmp_path / "out", "--full") == 2
    assert "could not be compared: no more" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]


def test_what_from_hf_read_wrongly_is_kept_beside(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from skv_tools.convert import from_hf as module

    fuse = module.fuse
    monkeypatch.setattr(module, "fuse", lambda entry, parts, model: fuse(entry, parts[::-1], model))
    save(make("llama", layers=2), tmp_path / "hf")
    assert call("from-hf", tmp_path / "hf", tmp_path / "ours", "--tokenizer", "byte") == 2
    assert "it is not what it was made from" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours.failed"]


def test_the_reference_holds_one_layer_at_a_time(
    outliers: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, chunks, alive = layerwise.RoutedChunk, [], []

    def counting(*given: Any) -> Any:
        gc.collect()
        alive.append(sum(chunk() is not None for chunk in chunks))
        chunk = built(*given)
        chunks.append(weakref.ref(chunk))
        return chunk

    monkeypatch.setattr(layerwise, "RoutedChunk", counting)
    tokens = comparison_tokens(exported, TEXT, 8)
    checkpoint_log_probs(outliers, tokens, [(HALF, torch.float64)], torch.float32)
    assert len(alive) == LAYERS
    assert max(alive) == 0  # of those before
