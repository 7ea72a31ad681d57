"""Damaged prepared sets: refused in one line, or every sample is there and right."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skv_dist.config.data import DataConfig
from skv_dist.data.examples import TokenDocument
from skv_dist.data.open import open_data
from skv_dist.data.token_set import write_prepared
from skv_dist.data.tokenizer import ByteTokenizer
from skv_dist.errors import UserError
from tests.fuzz.bounds import bounded, examples
from tests.fuzz.conftest import fresh
from tests.fuzz.damage import Damage, choices, damage_one, damages

_SAMPLES = 20


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    documents = (TokenDocument(rng.integers(3, 259, size), number, None) for number, size in enumerate(range(5, 30)))
    write_prepared(out := tmp_path_factory.mktemp("sets") / "texts", documents, ByteTokenizer(), [])
    return out


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(1)
    documents = (
        TokenDocument(rng.integers(3, 259, size), number, np.arange(size) > size // 2)
        for number, size in enumerate(range(5, 30))
    )
    write_prepared(out := tmp_path_factory.mktemp("sets") / "examples", documents, ByteTokenizer(), [])
    return out


def samples_of(folder: Path) -> list[np.ndarray]:
    """Of training and of validation, with what counts."""
    config = DataConfig.model_validate(
        {
            "sequence_length": 8,
            "sources": [{"path": str(folder), "format": "prepared"}],
            "validation_fraction": 0.3,
            "reset_attention": True,
        }
    )
    parts = open_data(config, ByteTokenizer(), 0, lambda: None)
    found = []
    for part in parts:
        assert part is not None
        for position in range(_SAMPLES):
            tokens, documents, counts, _ = part[position]
            found += [tokens, documents, np.ones(len(tokens), bool) if counts is None else counts]
    return found


@pytest.mark.parametrize("kind", ["texts", "answered"])
@examples(100)
@given(choice=choices, damage=damages, times=st.integers(1, 2))
def test_damage(
    request: pytest.FixtureRequest, work: Path, kind: str, choice: float, damage: Damage, times: int
) -> None:
    whole: Path = request.getfixturevalue(kind)
    folder = fresh(work) / "set"
    shutil.copytree(whole, folder)
    name = damage_one(folder, choice, damage)
    try:
        with bounded():
            found = samples_of(folder)
    except UserError as error:
        refusal = str(error)
        assert name is not None
    else:
        refusal = None
        right = samples_of(whole)
        if name in ("tokens.bin", "tokens.answer", "documents.hash"):  # have no sums (docs/security.md)
            assert all(len(sample) == 9 for sample in found)
            assert all(((sample >= 0) & (sample < 259)).all() for sample in found)
        else:
            assert all(np.array_equal(one, other) for one, other in zip(found, right, strict=True))
    assert refusal is None or str(folder) in refusal
