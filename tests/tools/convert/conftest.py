"""What the tests of `skv-convert` share."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from skv_tools.convert import run_engine
from skv_tools.convert.cli import main

from tests.support.processes import run_forked
from tests.tools.convert.hf_models import Call, make, save


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    def convert(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["skv-convert", *map(str, arguments)])
        return main()

    return convert


@pytest.fixture(autouse=True)
def engines_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines run in processes whose imports are done. The last test starts a new interpreter, as users do."""
    monkeypatch.setattr(run_engine, "subprocess", SimpleNamespace(run=run_forked))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with bytes for tokens, converted to ours."""
    from skv_tools.convert.from_hf import from_hf

    folder = tmp_path_factory.mktemp("qwen3")
    from_hf(save(make("qwen3"), folder / "hf"), folder / "ours", "byte")
    return folder / "ours"
