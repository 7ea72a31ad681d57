"""What a run says before its first step."""

from pathlib import Path
from typing import Any

import pytest

from skv_dist.training.report import _lacks_bf16
from tests.support.jobs.loop import run_and_print
from tests.support.settings import VOCAB_OF_BYTES, run_settings


@pytest.mark.parametrize(
    ("content", "lacks"),
    [
        ("model name : x\nflags\t\t: fpu avx2 fma\n", True),
        ("flags : fpu avx2 avx512_bf16\n", False),
        ("flags : amx_tile amx_bf16\n", False),
        ("Features\t: fp asimd bf16\n", False),
        ("Features\t: fp asimd\n", True),
        ("processor : 0\n", False),
    ],
)
def test_a_processor_without_products_of_bf16_is_known(tmp_path: Path, content: str, lacks: bool) -> None:
    (tmp_path / "cpuinfo").write_text(content)
    assert _lacks_bf16(tmp_path / "cpuinfo") is lacks
    assert not _lacks_bf16(tmp_path / "gone")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_in_bf16_on_such_a_processor_says_that_it_is_slow(
    workers: Any, text: Path, tmp_path: Path, precision: str
) -> None:
    settings = run_settings(text, tmp_path / "run", train={"steps": 1, "precision": precision}, eval={"every": 0})
    _, printed = workers(1)(run_and_print, settings)[0]
    lacks = _lacks_bf16(Path("/proc/cpuinfo"))
    assert ("train.precision=fp32 is many times faster" in printed) is (lacks and precision == "bf16")


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"pipeline": 2}])
def test_a_run_says_how_large_the_whole_model_is_and_with_what_it_begins(
    workers: Any, text: Path, tmp_path: Path, parallel: dict[str, int]
) -> None:
    """Tied and padded weights count once and without padding, in every layout."""

    def banner(name: str, **sections: Any) -> str:
        given = {"model": {"tie_embeddings": True}, "train": {"steps": 1}, "eval": {"every": 0}, **sections}
        settings = run_settings(text, tmp_path / name, parallel=parallel, **given)
        return str(workers(2 if parallel else 1)(run_and_print, settings)[0][1])

    layer = 32 * (32 + 2 * 2 * 8) + 32 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 8  # projections, norms, norms of heads
    size = VOCAB_OF_BYTES * 32 + 8 * layer + 32
    first = banner("first", train={"steps": 1, "freeze": ["embedding.weight"]})
    assert f" {size:,} parameters" in first
    assert f"{VOCAB_OF_BYTES * 32:,} of them frozen" in first
    assert "begins:    with random weights, seed 7" in first
    weights = tmp_path / "first" / "checkpoints" / "step_00000001"
    assert f"begins:    with the weights of {weights}" in banner("next", checkpoint={"init_from": str(weights)})
    assert f"begins:    with step 1 of {weights}" in banner("first", train={"steps": 1, "freeze": ["embedding.weight"]})
