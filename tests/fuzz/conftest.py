"""What the fuzz tests share."""

import shutil
from pathlib import Path

import pytest

from tests.fuzz.bounds import Caller
from tests.tools.convert.hf_models import make, save, words_tokenizer


@pytest.fixture
def caller(capsys: pytest.CaptureFixture[str]) -> Caller:
    return Caller(capsys)


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer, its weights in several files. Not to be changed."""
    folder = save(make("qwen3", layers=2), tmp_path_factory.mktemp("stock") / "hf", "60KB")
    words_tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.fixture(scope="session")
def checkpoint(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That folder as a checkpoint. Not to be changed."""
    from skv_tools.convert.from_hf import from_hf

    out = tmp_path_factory.mktemp("ours") / "step_00000000"
    from_hf(stock, out, None)
    return out


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint for engines, its layers sharing. Not to be changed."""
    from skv_tools.convert.to_hf import Export, write_folder

    out = tmp_path_factory.mktemp("exported")
    write_folder(checkpoint, out, Export((0, 0)))
    return out


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder that each example empties first (`fresh`)."""
    return tmp_path / "work"


def fresh(work: Path) -> Path:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    return work
