"""With routing.policy none a converted model is transformers' Qwen3, Llama or Mistral, in every tensor layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skv_tools.convert.from_hf import from_hf

from skv_dist.checkpoint.frozen_model import config_of
from skv_dist.checkpoint.load import read_tensors, tensor_shapes
from tests.support.jobs import parity
from tests.support.settings import config
from tests.tools.convert.family_cases import CASES
from tests.tools.convert.hf_models import LLAMA3, make, save


def converted(model: Any, folder: Path, length: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Some tokens [2, length], transformers' logits for them, and the weights of the checkpoint ``folder / "ours"``."""
    from_hf(save(model, folder / "hf"), folder / "ours", "byte")
    tokens = torch.randint(0, 262, (2, length))
    with torch.no_grad():
        theirs = model(tokens).logits.numpy()
    read = read_tensors(folder / "ours", list(tensor_shapes(folder / "ours")))
    return tokens.numpy(), theirs, {name.removeprefix("model."): value.numpy() for name, value in read.items()}


@pytest.mark.parametrize(
    ("kind", "tied", "scaled", "processes"),
    [
        ("qwen3", True, False, 1),
        ("qwen3", False, False, 2),
        ("llama", False, True, 1),
        ("llama", True, True, 2),
        ("mistral", False, False, 2),
    ],
)
def test_logits_equal_transformers(
    workers: Any, tmp_path: Path, kind: str, tied: bool, scaled: bool, processes: int
) -> None:
    tokens, theirs, weights = converted(make(kind, tied, scaled, layers=4), tmp_path, length=48)
    settings = config(
        model={
            "num_layers": 4,
            "head_dim": 16 if kind == "qwen3" else 8,
            "qk_norm": kind == "qwen3",
            "tie_embeddings": tied,
            "vocab_size": 262,
            "max_position_embeddings": 128,
            "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("rope")} if scaled else None,
        },
        data={"sequence_length": 48},
        parallel={"zero_stage": 0, "tensor": processes},
    )
    ours = workers(processes)(parity.logits, settings, weights, tokens, [0, 1, 2, 3])[0][..., :262]
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    wrong = workers(processes)(parity.logits, settings, weights, tokens, [0, 1, 1, 3])[0][..., :262]
    assert np.abs(wrong - theirs).max() > 1e-2 * np.abs(theirs).max()


@pytest.mark.parametrize("name", CASES)
def test_logits_of_families_equal_transformers(workers: Any, tmp_path: Path, name: str) -> None:
    """Over two tensor-parallel ranks, in texts that are longer than what rotary positions were first made for."""
    tokens, theirs, weights = converted(CASES[name].model(), tmp_path, length=80)
    section = config_of(tmp_path / "ours").model.model_dump()
    settings = config(model=section, parallel={"zero_stage": 0, "tensor": 2})
    ours = workers(2)(parity.logits, settings, weights, tokens, [0, 1, 2, 3])[0][..., :262]
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
