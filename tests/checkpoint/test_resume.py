"""Exact resume on the same layout, and from any layout into any."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import tensor_shapes
from tests.support.checkpoints import END, HALF, assert_equal, resumed_run, small_run, whole_run
from tests.support.jobs.checkpoint import read_and_write
from tests.support.jobs.initial_values import loaded_into_nan
from tests.support.layouts import Layout
from tests.support.runs import losses
from tests.support.workers import JobFailedError

SAME = [
    (Layout(zero_stage=0), "fp32", True),
    (Layout(zero_stage=1, replicas=2), "bf16", True),
    (Layout(zero_stage=2, replicas=2), "fp32", False),
    (Layout(zero_stage=3, replicas=2), "bf16", True),
    (Layout(zero_stage=3, tensor=2), "fp32", False),
    (Layout(zero_stage=1, tensor=2, sequence_parallel=True), "bf16", False),
    (Layout(zero_stage=2, pipeline=2), "bf16", True),
    (Layout(zero_stage=1, pipeline=2, virtual_pipeline=2), "fp32", True),
    (Layout(zero_stage=0, pipeline=2, virtual_pipeline=2), "bf16", False),
    (Layout(zero_stage=1, replicas=2, engine="fsdp"), "bf16", False),
    (Layout(zero_stage=3, pipeline=2, replicas=2, engine="fsdp"), "bf16", True),
]


WITHOUT_FSDP = (Layout(zero_stage=0), Layout(replicas=2, zero_stage=2), Layout(zero_stage=3))


@pytest.mark.parametrize(("layout", "precision", "in_background"), SAME)
def test_resuming_on_the_same_layout_is_bitwise(
    workers: Any, text: Path, tmp_path: Path, layout: Layout, precision: str, in_background: bool
) -> None:
    sections = {"train": {"precision": precision}, "checkpoint": {"async_save": in_background}}
    expected = whole_run(workers, text, tmp_path / "whole", layout, **sections)
    found = resumed_run(workers, text, tmp_path / "whole", tmp_path / "resumed", layout, **sections)
    assert [line["step"] for line in found] == list(range(1, END + 1))
    assert losses(found) == losses(expected)
    assert_equal(*(files.folder_of(tmp_path / run / "checkpoints", END) for run in ("resumed", "whole")))


@pytest.mark.parametrize(
    "layout",
    [*WITHOUT_FSDP, Layout(replicas=2, zero_stage=3, engine="fsdp")],
    ids=str,
)
def test_frozen_weights_have_no_moments_and_resume(workers: Any, text: Path, tmp_path: Path, layout: Layout) -> None:
    sections = {"train": {"precision": "bf16", "freeze": ["*.mlp.*", "embedding.weight"]}}
    expected = whole_run(workers, text, tmp_path / "whole", layout, **sections)
    found = resumed_run(workers, text, tmp_path / "whole", tmp_path / "resumed", layout, **sections)
    assert losses(found) == losses(expected)
    end = files.folder_of(tmp_path / "whole" / "checkpoints", END)
    assert_equal(files.folder_of(tmp_path / "resumed" / "checkpoints", END), end)
    names = tensor_shapes(end)
    assert "model.layers.0.mlp.linear_fc1.weight" in names
    assert not any(name.startswith("exp_avg") and (".mlp." in name or "embedding" in name) for name in names)


@pytest.mark.parametrize(
    "layout",
    [*WITHOUT_FSDP, Layout(replicas=2, zero_stage=2, engine="fsdp")],
    ids=str,
)
def test_nothing_is_drawn_where_a_checkpoint_is_loaded(
    workers: Any, text: Path, finished: Path, tmp_path: Path, layout: Layout
) -> None:
    settings = small_run(text, tmp_path, layout)
    folder = finished / "checkpoints" / f"step_{END:08d}"
    for drew, spoilt in workers(layout.processes)(loaded_into_nan, settings, str(folder)):
        assert not drew
        assert spoilt == []


TP2PP2 = Layout(tensor=2, pipeline=2, sequence_parallel=True, zero_stage=1)
LAYOUTS = {
    "one": Layout(zero_stage=0),
    "one ZeRO-3": Layout(zero_stage=3),
    "DP2 ZeRO-2": Layout(replicas=2, zero_stage=2),
    "DP2 ZeRO-3": Layout(replicas=2, zero_stage=3),
    "DP4 ZeRO-2": Layout(replicas=4, zero_stage=2),
    "TP2 ZeRO-1": Layout(tensor=2, zero_stage=1),
    "TP2DP2 ZeRO-3": Layout(tensor=2, replicas=2, zero_stage=3),
    "TP2PP2 ZeRO-1": TP2PP2,
    "PP4 ZeRO-1": Layout(pipeline=4, zero_stage=1),
    "PP2VPP2 ZeRO-2": Layout(pipeline=2, virtual_pipeline=2, zero_stage=2),
    "PP2DP2 ZeRO-2": Layout(pipeline=2, replicas=2, zero_stage=2),
    "PP2DP2 FSDP-3": Layout(pipeline=2, replicas=2, zero_stage=3, engine="fsdp"),
    "TP2DP2 FSDP-1": Layout(tensor=2, replicas=2, zero_stage=1, engine="fsdp"),
}
PAIRS = [
    ("TP2PP2 ZeRO-1", "one ZeRO-3"),
    ("PP4 ZeRO-1", "PP2VPP2 ZeRO-2"),
    ("DP4 ZeRO-2", "TP2 ZeRO-1"),
    ("one", "TP2PP2 ZeRO-1"),
    ("one ZeRO-3", "PP4 ZeRO-1"),
    ("DP2 ZeRO-3", "TP2DP2 ZeRO-3"),
    ("TP2DP2 ZeRO-3", "DP2 ZeRO-2"),
    ("DP2 ZeRO-2", "DP4 ZeRO-2"),
    ("PP2VPP2 ZeRO-2", "DP2 ZeRO-3"),
    ("PP2DP2 ZeRO-2", "one"),
    ("TP2 ZeRO-1", "PP2DP2 ZeRO-2"),
    ("DP4 ZeRO-2", "PP2VPP2 ZeRO-2"),
    ("DP2 ZeRO-2", "PP2DP2 FSDP-3"),
    ("PP2DP2 FSDP-3", "DP2 ZeRO-3"),
    ("PP2DP2 FSDP-3", "TP2DP2 FSDP-1"),
    ("TP2DP2 FSDP-1", "one"),
]
_written: dict[str, Path] = {}


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_resuming_on_another_layout(
    workers: Any, text: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, source: str, target: str
) -> None:
    sections: dict[str, Any] = {"model": {"tie_embeddings": True}}
    if source not in _written:
        _written[source] = tmp_path_factory.mktemp("written")
        whole_run(workers, text, _written[source], LAYOUTS[source], **sections)
    before, layout = _written[source], LAYOUTS[target]
    lines = [json.loads(line) for line in (before / "metrics.jsonl").read_text().splitlines()]

    found = resumed_run(workers, text, before, tmp_path / "resumed", layout, **sections)
    assert [line["tokens"] for line in found] == [line["tokens"] for line in lines]  # no sample twice, none left out
    np.testing.assert_allclose(losses(found), losses(lines), rtol=1e-5)

    halfway = files.folder_of(before / "checkpoints", HALF)
    given = small_run(text, tmp_path, layout, **sections)
    workers(layout.processes)(read_and_write, given, str(halfway), str(tmp_path / "again"))
    assert_equal(files.folder_of(tmp_path / "again", 1), halfway)


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_sizes_that_the_replicas_do_not_divide(
    workers: Any, text: Path, finished: Path, tmp_path: Path, engine: str
) -> None:
    source = files.folder_of(finished / "checkpoints", END)
    layout = Layout(replicas=3, zero_stage=3, engine=engine)
    given = small_run(text, tmp_path, layout, train={"global_batch_size": 6})
    workers(3)(read_and_write, given, str(source), str(tmp_path / "again"))
    assert_equal(files.folder_of(tmp_path / "again", 1), source)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"model": {"qk_norm": False}}, "model.qk_norm"),
        ({"routing": {"cross_prob": 0.1}}, "routing.cross_prob"),
        ({"train": {"seed": 8}}, "train.seed"),
    ],
)
def test_another_run_is_refused_by_key(
    workers: Any, text: Path, finished: Path, tmp_path: Path, sections: dict[str, Any], key: str
) -> None:
    source = str(files.folder_of(finished / "checkpoints", HALF))
    checkpoint: dict[str, Any] = {"resume": source}
    with pytest.raises(JobFailedError, match=f"belongs to another run: {key} was"):
        whole_run(workers, text, tmp_path / "a", Layout(), checkpoint=checkpoint, **sections)
    if key.startswith("routing"):
        lines = whole_run(
            workers, text, tmp_path / "b", Layout(), checkpoint={**checkpoint, "allow_changed": [key]}, **sections
        )
        assert [line["step"] for line in lines] == list(range(HALF + 1, END + 1))


def test_weights_alone_start_a_new_run(workers: Any, text: Path, finished: Path, tmp_path: Path) -> None:
    source = files.folder_of(finished / "checkpoints", END)
    routing = {"policy": "subset"}
    checkpoint = {"init_from": str(source)}
    tuned = whole_run(workers, text, tmp_path / "a", Layout(tensor=2), checkpoint=checkpoint, routing=routing)
    fresh = whole_run(workers, text, tmp_path / "b", Layout(tensor=2), routing=routing)
    assert tuned[0]["step"] == 1
    assert tuned[0]["loss"] < fresh[0]["loss"] - 0.1
