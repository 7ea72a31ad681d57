"""Checkpoint folders: read by others, damaged, on a full disk, too many."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import tensor_shapes
from skv_dist.errors import UserError
from tests.support.checkpoints import END, LAYERS, small_run, whole_run
from tests.support.jobs.loop import run_and_print
from tests.support.layouts import Layout
from tests.support.workers import JobFailedError


def test_one_process_and_megatron_read_it(finished: Path) -> None:
    from megatron.core.dist_checkpointing import load_tensors_metadata

    folder = files.folder_of(finished / "checkpoints", END)
    files.verify(folder)
    shapes = tensor_shapes(folder)
    assert shapes["model.embedding.weight"] == (259, 32)  # without padding
    assert {
        f"{part}.layers.{LAYERS - 1}.mlp.linear_fc2.weight" for part in ("model", "exp_avg", "exp_avg_sq")
    } <= shapes.keys()
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

    folder = tmp_path / "step_00000004"
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
    replicated = Layout(replicas=2, zero_stage=1)
    lines, printed = workers(2)(run_and_print, small_run(text, out, replicated))[0]
    assert f"checkpoint {broken} is damaged: state.json has 2 bytes" in printed
    assert "resumed from" in printed
    assert [line["step"] for line in lines] == list(range(1, END + 1))
    files.verify(broken)  # written anew
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]

    (broken / "state.json").write_text("{}")
    with pytest.raises(JobFailedError, match=r"state\.json has 2 bytes"):
        whole_run(workers, text, tmp_path / "other", replicated, checkpoint={"resume": str(broken)})


def test_old_checkpoints_go(workers: Any, text: Path, tmp_path: Path) -> None:
    keep = {"every": 1, "keep_last": 2, "keep_every": 3}
    whole_run(workers, text, tmp_path / "run", Layout(), train={"steps": 6}, checkpoint=keep)
    names = [path.name for path in files.existing(tmp_path / "run" / "checkpoints")]
    assert names == ["step_00000006", "step_00000005", "step_00000003"]
