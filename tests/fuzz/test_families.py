"""Random configurations of every family: converted rightly, there and back, or refused in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skv_tools.convert import layerwise
from skv_tools.convert.families import FAMILIES
from skv_tools.convert.from_hf import from_hf
from skv_tools.convert.to_hf import Export, write_folder

from skv_dist.errors import UserError
from tests.fuzz.bounds import bounded, examples
from tests.fuzz.conftest import fresh
from tests.tools.convert.hf_models import make, save

_LAYERS, _LENGTH = 3, 40
_FULL = tuple(range(_LAYERS))
_some = st.booleans()
_factor = st.sampled_from([0.25, 0.7, 1.0, 3.0])
_window = st.sampled_from([1, 2, 7, 39, 40, 64, 200])
_layer_types = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=_LAYERS, max_size=_LAYERS)
_cap = st.none() | st.sampled_from([2.0, 30.0])


@st.composite
def _rope(
    draw: st.DrawFn, kinds: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
) -> Any:
    kind = draw(st.sampled_from(kinds))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 1e4, 5e5]))}
    if kind not in ("default", "longrope"):
        rope["factor"] = draw(st.sampled_from([1.0, 2.0, 8.0]))
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from([2.0, 4.0]))}
    if kind == "yarn":
        rope |= draw(st.fixed_dictionaries({}, optional={"beta_fast": st.just(8.0), "attention_factor": _factor}))
    if kind == "longrope":
        divisors = st.lists(_factor, min_size=4, max_size=4)
        rope |= {"short_factor": draw(divisors), "long_factor": draw(divisors)}
    if kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = draw(st.sampled_from([16, 32, 64]))
    return rope


def _by_kind() -> Any:
    kinds = ("default", "linear", "yarn")
    return st.fixed_dictionaries({"full_attention": _rope(kinds), "sliding_attention": _rope(("default",))})


_BIAS = {"attention_bias": _some}
_BY_LAYER = {"use_sliding_window": _some, "sliding_window": _window, "layer_types": st.none() | _layer_types}
_GEMMA = {"query_pre_attn_scalar": st.integers(1, 40), "final_logit_softcapping": _cap}
_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {**_BIAS, "mlp_bias": _some, "rope_parameters": _rope()},
    "qwen2": {**_BY_LAYER, "max_window_layers": st.integers(0, 4), "rope_parameters": _rope()},
    "qwen3": {**_BIAS, **_BY_LAYER, "rope_parameters": _rope()},
    "mistral": {"sliding_window": st.none() | _window, "rope_parameters": _rope()},
    "smollm3": {
        **_BIAS,
        **_BY_LAYER,
        "mlp_bias": _some,
        "no_rope_layers": st.none() | st.lists(st.integers(0, 1), min_size=_LAYERS, max_size=_LAYERS + 1),
        "rope_parameters": _rope(),
    },
    "granite": {
        **_BIAS,
        "mlp_bias": _some,
        "embedding_multiplier": _factor,
        "residual_multiplier": _factor,
        "attention_multiplier": _factor,
        "logits_scaling": _factor,
        "rope_parameters": _rope(),
    },
    "olmo2": {**_BIAS, "rope_parameters": _rope()},
    "olmo3": {**_BIAS, "sliding_window": _window, "layer_types": _layer_types, "rope_parameters": _by_kind()},
    "gemma2": {
        **_BIAS,
        **_GEMMA,
        "attn_logit_softcapping": _cap,
        "sliding_window": _window,
        "layer_types": _layer_types,
        "rope_parameters": _rope(("default", "linear", "yarn")),
    },
    "gemma3_text": {
        **_BIAS,
        **_GEMMA,
        "sliding_window": _window,
        "layer_types": _layer_types,
        "rope_parameters": _by_kind(),
    },
    "phi3": {"sliding_window": st.none() | _window, "rope_parameters": _rope(("default", "longrope"))},
}


def test_every_family_has_options() -> None:
    assert _OPTIONS.keys() == FAMILIES.keys()


def _log_probs(model: Any, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return torch.log_softmax(model(tokens).logits.double(), -1).numpy()


@pytest.mark.parametrize("kind", _OPTIONS)
@examples(4)
@given(data=st.data())
def test_converted_rightly_or_refused(work: Path, kind: str, data: st.DataObject) -> None:
    from transformers import AutoModelForCausalLM

    options = data.draw(st.fixed_dictionaries({**_OPTIONS[kind], "tied": _some}))
    context = options["rope_parameters"].get("original_max_position_embeddings")
    if kind == "phi3" and context is not None:
        options["original_max_position_embeddings"] = context
    folder = fresh(work)
    tokens = torch.randint(3, 262, (1, _LENGTH), generator=torch.Generator().manual_seed(1))
    try:
        model = make(kind, layers=_LAYERS, **options)
        theirs = _log_probs(model, tokens)
    except Exception:  # transformers has no such model, or cannot run it
        return
    refused: str | None = None
    with bounded():
        try:
            from_hf(save(model, folder / "hf"), folder / "ours", "byte")
        except UserError as error:
            refused = str(error)
        if refused is not None:
            assert "\n" not in refused
            return
        cases = [(_FULL, torch.float32)]
        ours = layerwise.checkpoint_log_probs(folder / "ours", tokens.numpy(), cases, torch.float32)
        assert np.abs(ours[cases[0]] - theirs).max() < 1e-3, options
        write_folder(folder / "ours", folder / "back", Export(_FULL, architecture=kind))
        back = AutoModelForCausalLM.from_pretrained(folder / "back").eval()
        assert np.abs(_log_probs(back, tokens) - theirs).max() < 1e-4, options
