"""Skipping in vLLM through our plugin; skipped where that is not installed (docs/engines.md says how to run it)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from skv_tools.engines.models import modeling_skv
from skv_tools.engines.models.vllm_model import _check_skipping
from vllm.config import CUDAGraphMode

from tests.tools.small_model import LAYERS, SHAPE

SKIPS = {"kv_sharing_fast_prefill": True}
MAPS = {
    "half trails": [0, 1, 2, 3, 3, 3, 2, 1],
    "one owner": [0] * LAYERS,
    "the last owner has sharers before it": [0, 1, 0, 3, 1, 3, 3, 0],
    "none trails": [0, 0, 2, 2, 4, 4, 6, 7],
}


def export(folder: Path, sources: list[int], **fields: Any) -> Path:
    """Random weights, and the files that vLLM asks for."""
    import torch

    torch.manual_seed(3)
    config = modeling_skv.SkvConfig(
        **SHAPE | {"head_dim": 32},  # the narrowest that vLLM has on CPUs
        initializer_range=0.2,
        kv_source_layers=sources,
        **fields,
    )
    modeling_skv.SkvForCausalLM(config).save_pretrained(folder)
    shutil.copy(modeling_skv.__file__, folder)
    written = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "SkvConfig", "AutoModel": "SkvModel", "AutoModelForCausalLM": "SkvForCausalLM"}
    written["auto_map"] = {name: f"modeling_skv.{of}" for name, of in classes.items()}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def answers(folder: Path, **engine: Any) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [prompts, new tokens, V] and rows [forwards, layers]."""
    out = folder / "out.npz"
    command = [sys.executable, "-m", "tests.tools.engines.vllm_answers", folder, out, json.dumps(engine)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as found:
        return found["logs"], found["rows"]


@pytest.mark.parametrize("sources", MAPS.values(), ids=MAPS)
def test_trailing_layers_run_over_the_wanted_rows(sources: list[int], tmp_path: Path) -> None:
    folder, trailing = export(tmp_path / "out", sources), max(sources) + 1
    expected, whole = answers(folder)
    assert (whole == whole[:, :1]).all()
    for chunk in (64, 16):  # tokens of all prompts that one forward takes
        logs, rows = answers(folder, **SKIPS, max_num_batched_tokens=chunk)
        np.testing.assert_allclose(logs, expected, atol=1e-5)
        assert rows[:, 0].max() > 4 >= rows[:, trailing:].max(initial=0)
        assert (rows[:, :trailing] == rows[:, :1]).all()


def test_an_adaptive_folder_skips_what_trails_in_its_map(tmp_path: Path) -> None:
    folder = export(tmp_path / "out", list(range(LAYERS)), kv_order=[0, 1, 3, 2, 7, 6, 5, 4])
    map_of = {"hf_overrides": {"kv_retention": 0.375}}
    logs, rows = answers(folder, **map_of, **SKIPS)
    np.testing.assert_allclose(logs, answers(folder, **map_of)[0], atol=1e-5)
    assert rows[0, 3] > rows[0, 4] == 4


@pytest.mark.parametrize(
    ("graphs", "stages", "message"),
    [
        (CUDAGraphMode.NONE, 2, "--pipeline-parallel-size 2"),
        (CUDAGraphMode.PIECEWISE, 1, "--enforce-eager"),
        (CUDAGraphMode.NONE, 1, None),
    ],
)
def test_what_was_not_seen_to_be_right_is_refused(graphs: CUDAGraphMode, stages: int, message: str | None) -> None:
    def check(skips: bool) -> None:
        cache, compilation = SimpleNamespace(kv_sharing_fast_prefill=skips), SimpleNamespace(cudagraph_mode=graphs)
        _check_skipping(SimpleNamespace(cache_config=cache, compilation_config=compilation), stages)

    check(False)
    if message is None:
        check(True)
    else:
        with pytest.raises(ValueError, match=message):
            check(True)
