"""Checkpoints: exact resume, from any layout into any, and damage that is found and named."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import read_tensors, tensor_shapes
from skv_dist.errors import UserError
from tests.support.jobs.checkpoint import read_and_write
from tests.support.jobs.loop import run_and_print, run_training
from tests.support.runs import losses
from tests.support.settings import run_settings
from tests.support.workers import JobFailedError

HALF, END = 3, 6


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder, list(tensor_shapes(folder)))


def equal(found: Path, expected: Path) -> None:
    """Every weight and moment, bit by bit."""
    one, other = tensors(found), tensors(expected)
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert torch.equal(one[name], value), name


def whole_run(workers: Any, text: Path, out: Path, parallel: dict[str, Any], **sections: Any) -> list[dict[str, Any]]:
    """Six steps without interruption, with checkpoints at three and six."""
    checkpoint = {"every": HALF, "keep_last": None, **sections.pop("checkpoint", {})}
    keys = {key: value for key, value in parallel.items() if key != "replicas"}
    given = run_settings(text, out, parallel=keys, checkpoint=checkpoint, **sections)
    lines = workers(processes(parallel))(run_training, given)[0]
    return [{k: v for k, v in line.items() if not k.startswith("checkpoint/")} for line in lines]


def resumed_run(
    workers: Any, text: Path, before: Path, out: Path, parallel: dict[str, Any], **sections: Any
) -> list[dict[str, Any]]:
    """The last three steps, from the checkpoint that a run has left at three."""
    (out / "checkpoints").mkdir(parents=True)
    shutil.copytree(files.folder_of(before / "checkpoints", HALF), files.folder_of(out / "checkpoints", HALF))
    shutil.copy(before / "metrics.jsonl", out / "metrics.jsonl")
    return whole_run(workers, text, out, parallel, **sections)


def processes(parallel: dict[str, Any]) -> int:
    return int(parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("replicas", 1))


def layout(replicas: int = 1, **keys: Any) -> dict[str, Any]:
    return {"replicas": replicas, **keys}


SAME = [
    (layout(zero_stage=0), "fp32", True),
    (layout(zero_stage=1, replicas=2), "bf16", True),
    (layout(zero_stage=2, replicas=2), "fp32", False),
    (layout(zero_stage=3, replicas=2), "bf16", True),
    (layout(zero_stage=3, tensor=2), "fp32", False),
    (layout(zero_stage=1, tensor=2, sequence_parallel=True), "bf16", False),
    (layout(zero_stage=2, pipeline=2), "bf16", True),
    (layout(zero_stage=1, pipeline=2, virtual_pipeline=2), "fp32", True),
    (layout(zero_stage=0, pipeline=2, virtual_pipeline=2), "bf16", False),
]


@pytest.mark.parametrize(("parallel", "precision", "in_background"), SAME)
def test_resuming_on_the_same_layout_is_bitwise(
    workers: Any, text: Path, tmp_path: Path, parallel: dict[str, Any], precision: str, in_background: bool
) -> None:
    sections = {"train": {"precision": precision}, "checkpoint": {"async_save": in_background}}
    expected = whole_run(workers, text, tmp_path / "whole", parallel, **sections)
    found = resumed_run(workers, text, tmp_path / "whole", tmp_path / "resumed", parallel, **sections)
    assert [line["step"] for line in found] == list(range(1, END + 1))
    assert losses(found) == losses(expected)
    ends = [files.folder_of(tmp_path / run / "checkpoints", END) for run in ("resumed", "whole")]
    equal(*ends)


TP2PP2 = layout(tensor=2, pipeline=2, sequence_parallel=True, zero_stage=1)
LAYOUTS = {
    "one": layout(zero_stage=0),
    "one ZeRO-3": layout(zero_stage=3),
    "DP2 ZeRO-2": layout(replicas=2, zero_stage=2),
    "DP2 ZeRO-3": layout(replicas=2, zero_stage=3),
    "DP4 ZeRO-2": layout(replicas=4, zero_stage=2),
    "TP2 ZeRO-1": layout(tensor=2, zero_stage=1),
    "TP2DP2 ZeRO-3": layout(tensor=2, replicas=2, zero_stage=3),
    "TP2PP2 ZeRO-1": TP2PP2,
    "PP4 ZeRO-1": layout(pipeline=4, zero_stage=1),
    "PP2VPP2 ZeRO-2": layout(pipeline=2, virtual_pipeline=2, zero_stage=2),
    "PP2DP2 ZeRO-2": layout(pipeline=2, replicas=2, zero_stage=2),
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
    before, parallel = _written[source], LAYOUTS[target]
    lines = [json.loads(line) for line in (before / "metrics.jsonl").read_text().splitlines()]

    found = resumed_run(workers, text, before, tmp_path / "resumed", parallel, **sections)
    assert [line["tokens"] for line in found] == [line["tokens"] for line in lines]  # no sample twice, none left out
    np.testing.assert_allclose(losses(found), losses(lines), rtol=1e-5)

    halfway = files.folder_of(before / "checkpoints", HALF)
    keys = {key: value for key, value in parallel.items() if key != "replicas"}
    given = run_settings(text, tmp_path, parallel=keys, **sections)
    workers(processes(parallel))(read_and_write, given, str(halfway), str(tmp_path / "again"))
    equal(files.folder_of(tmp_path / "again", 1), halfway)


def test_sizes_that_the_replicas_do_not_divide(workers: Any, text: Path, finished: Path, tmp_path: Path) -> None:
    source = files.folder_of(finished / "checkpoints", END)
    given = run_settings(text, tmp_path, parallel={"zero_stage": 3}, train={"global_batch_size": 6})
    workers(3)(read_and_write, given, str(source), str(tmp_path / "again"))
    equal(files.folder_of(tmp_path / "again", 1), source)


@pytest.fixture(scope="module")
def finished(workers: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with checkpoints at three and six."""
    out = tmp_path_factory.mktemp("finished")
    whole_run(workers, text, out, layout(replicas=2, zero_stage=1))
    return out


def test_one_process_and_megatron_read_it(finished: Path) -> None:
    from megatron.core.dist_checkpointing import load_tensors_metadata

    folder = files.folder_of(finished / "checkpoints", END)
    files.verify(folder)
    shapes = tensor_shapes(folder)
    assert shapes["model.embedding.weight"] == (259, 32)  # without padding
    assert {f"{what}.layers.7.mlp.linear_fc2.weight" for what in ("model", "exp_avg", "exp_avg_sq")} <= shapes.keys()
    theirs = load_tensors_metadata(str(folder))
    assert {name: tuple(tensor.global_shape) for name, tensor in theirs.items()} == shapes
    assert (finished / "checkpoints" / "latest").read_text() == folder.name + "\n"


def test_every_kind_of_damage_is_found_and_named(finished: Path, tmp_path: Path) -> None:
    whole = files.folder_of(finished / "checkpoints", END)
    names = sorted(path.name for path in whole.iterdir())
    assert len(names) >= 7  # two ranks' tensors, .metadata, metadata.json, state.json, config.yaml, manifest.json
    for name in names:
        for damage in ("deleted", "cut", "flipped"):
            folder = tmp_path / f"{name}-{damage}" / whole.name
            shutil.copytree(whole, folder)
            file = folder / name
            content = bytearray(file.read_bytes())
            if damage == "deleted":
                file.unlink()
            elif damage == "cut":
                file.write_bytes(content[: len(content) // 2])
            else:
                content[len(content) // 2] ^= 1
                file.write_bytes(content)
            with pytest.raises(UserError, match="is damaged") as caught:
                files.verify(folder)
            if name != files.MANIFEST or damage != "flipped":
                assert name in str(caught.value)
    stray = tmp_path / "stray" / whole.name
    shutil.copytree(whole, stray)
    for name in (".DS_Store", ".nfs000001", "README"):
        (stray / name).touch()
    (stray / "folder").mkdir()
    files.verify(stray)  # whatever else lies there is no damage


def test_metadata_cannot_execute_anything(finished: Path, tmp_path: Path) -> None:
    import pickle

    class Bad:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit('executed')",))

    folder = tmp_path / "step_00000006"
    shutil.copytree(files.folder_of(finished / "checkpoints", END), folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Bad()))
    with pytest.raises(UserError, match="not part of the format"):
        tensor_shapes(folder)


def test_auto_passes_over_a_damaged_checkpoint_and_a_path_does_not(
    workers: Any, text: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    broken = files.folder_of(out / "checkpoints", END)
    (broken / "state.json").write_text("{}")
    (out / "checkpoints" / ".step_00000009.writing").mkdir()
    parallel = layout(replicas=2, zero_stage=1)
    keep = {"every": HALF, "keep_last": None}
    given = run_settings(text, out, parallel={"zero_stage": 1}, checkpoint=keep)
    lines, printed = workers(2)(run_and_print, given)[0]
    assert f"checkpoint {broken} is damaged: state.json has 2 bytes" in printed
    assert "resumed from" in printed
    assert [line["step"] for line in lines] == list(range(1, END + 1))
    files.verify(broken)  # written anew
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]

    (broken / "state.json").write_text("{}")
    with pytest.raises(JobFailedError, match=r"state\.json has 2 bytes"):
        whole_run(workers, text, tmp_path / "other", parallel, checkpoint={"resume": str(broken)})


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
        whole_run(workers, text, tmp_path / "a", layout(), checkpoint=checkpoint, **sections)
    if key.startswith("routing"):
        lines = whole_run(
            workers, text, tmp_path / "b", layout(), checkpoint={**checkpoint, "allow_changed": [key]}, **sections
        )
        assert [line["step"] for line in lines] == [4, 5, 6]


def test_weights_alone_start_a_new_run(workers: Any, text: Path, finished: Path, tmp_path: Path) -> None:
    source = files.folder_of(finished / "checkpoints", END)
    routing = {"policy": "subset"}
    checkpoint = {"init_from": str(source)}
    tuned = whole_run(workers, text, tmp_path / "a", layout(tensor=2), checkpoint=checkpoint, routing=routing)
    fresh = whole_run(workers, text, tmp_path / "b", layout(tensor=2), routing=routing)
    assert tuned[0]["step"] == 1
    assert tuned[0]["loss"] < fresh[0]["loss"] - 0.1


def test_old_checkpoints_go(workers: Any, text: Path, tmp_path: Path) -> None:
    keep = {"every": 1, "keep_last": 2, "keep_every": 3}
    whole_run(workers, text, tmp_path / "run", layout(), checkpoint=keep)
    names = [path.name for path in files.existing(tmp_path / "run" / "checkpoints")]
    assert names == ["step_00000006", "step_00000005", "step_00000003"]
