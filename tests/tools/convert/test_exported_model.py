"""The code that travels with exported folders, under transformers: training, outputs, saving, and its card."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.convert.hf_models import LAYERS, Call

ARBITRARY = [0, 1, 0, 1, 4, 4, 4, 1]
TOKENS = torch.arange(3, 27).repeat(2, 1)


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from skv_tools.convert.to_hf import Export, write_folder

    out = tmp_path_factory.mktemp("exported") / "out"
    out.mkdir()
    write_folder(checkpoint, out, Export(tuple(ARBITRARY)))
    return out


def load(folder: Path, **given: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **given).eval()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_under_checkpointing(folder: Path, reentrant: bool) -> None:
    plain = gradients(load(folder))
    model = load(folder)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients(model)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_trained_parts_of_a_frozen_model_get_their_gradients(folder: Path) -> None:
    """As adapters do: only the keys of lending layers learn, under re-entrant checkpointing."""

    def frozen() -> Any:
        model = load(folder)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("k_proj" in name)
        return model

    plain, model = gradients(frozen()), frozen()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    checkpointed = gradients(model)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])


@torch.no_grad()
def test_outputs_are_asked_for_as_in_transformers(folder: Path) -> None:
    model = load(folder, attn_implementation="eager")
    asked = model(TOKENS, output_attentions=True, output_hidden_states=True)
    assert len(asked.attentions) == LAYERS
    assert len(asked.hidden_states) == LAYERS + 1
    assert asked.attentions[3].shape == (2, 4, 24, 24)
    torch.testing.assert_close(asked.attentions[3].sum(-1), torch.ones(2, 4, 24))
    torch.testing.assert_close(model.lm_head(asked.hidden_states[-1]), asked.logits)
    plain = model(TOKENS)
    assert (plain.attentions, plain.hidden_states) == (None, None)
    model.config.output_attentions = model.config.output_hidden_states = True
    by_config = model(TOKENS)
    for mine, theirs in zip(
        (*by_config.attentions, *by_config.hidden_states), (*asked.attentions, *asked.hidden_states)
    ):
        torch.testing.assert_close(mine, theirs)
    assert model(TOKENS, output_attentions=False).attentions is None
    some = model(TOKENS, output_hidden_states=[0, -1]).hidden_states
    assert [state is not None for state in some] == [True, *[False] * (LAYERS - 1), True]
    fused = load(folder)(TOKENS, output_attentions=True)  # attention that does not say its weights
    assert fused.attentions == ()


def test_a_saved_model_holds_every_file_that_it_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    named = {config["model_file"], *(f"{place.split('.')[0]}.py" for place in config["auto_map"].values())}
    assert named == {"mlx_skv.py", "modeling_skv.py"}
    for name in named:
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    again = load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    again.save_pretrained(tmp_path / "saved")  # over itself
    assert (tmp_path / "saved" / "mlx_skv.py").stat().st_size
    monkeypatch.setattr(sys.modules[type(again).__module__], "_file_beside", lambda *_: None)
    again.save_pretrained(tmp_path / "without")  # as where the folder it came from has gone
    assert "model_file" not in json.loads((tmp_path / "without" / "config.json").read_text())


def test_the_card_runs(call: Call, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python, in the folder that holds the export; nobody is asked whether code may run."""
    assert call("to-hf", checkpoint, tmp_path / "out", "--kv-source-layers", *ARBITRARY, "--adaptive") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A token takes 768 bytes of cache instead of 2,048." in card  # 3 of 8 x keys, values x 2 heads x 16 x fp32
    assert "skv-dist[vllm]" not in card
    assert "pip install '.[vllm]'" in card
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("code is asked for"))
    exec(code, {})
