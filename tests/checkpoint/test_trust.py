"""A checkpoint that was made to execute code: every reader refuses it, and nothing is executed."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from skv_tools.checkpoint.cli import main as checkpoint_main
from skv_tools.convert.cli import main as convert_main
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import read_tensors, tensor_shapes
from skv_dist.checkpoint.metadata import SafeReader, read_into
from skv_dist.errors import UserError
from tests.support.checkpoints import changed
from tests.support.jobs.checkpoint import read_frozen
from tests.support.jobs.loop import run_training
from tests.support.settings import run_settings
from tests.support.workers import JobFailedError

NAME = "model.final_norm.weight"


class Command:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._file}",)


@pytest.fixture(scope="module")
def finished(workers: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    workers(1)(run_training, run_settings(text, out, train={"steps": 1}, eval={"every": 0}))
    return files.folder_of(out / "checkpoints", 1)


@pytest.fixture
def crafted(finished: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(the checkpoint, the file that it would make)."""
    made = tmp_path / "executed"

    def call_it_bytes(metadata: Any, folder: Path) -> None:
        with (folder / "__0_0.distcp").open("ab") as stream:
            begin = stream.tell()
            torch.save(Command(made), stream)
            length = stream.tell() - begin
        assert NAME in metadata.state_dict_metadata
        metadata.state_dict_metadata[NAME] = BytesStorageMetadata()
        metadata.storage_data = {place: info for place, info in metadata.storage_data.items() if place.fqn != NAME}
        metadata.storage_data[MetadataIndex(NAME)] = _StorageInfo("__0_0.distcp", begin, length)

    return changed(finished, tmp_path / "step_00000001", call_it_bytes), made


def test_torch_alone_would_execute_it(crafted: tuple[Path, Path]) -> None:
    """Or the tests below would show nothing."""
    import torch.distributed.checkpoint as dcp

    folder, made = crafted
    dcp.load({NAME: torch.zeros(32)}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert made.exists()


@pytest.mark.parametrize("reader", ["resume", "init_from", "skv-eval"])
def test_runs_refuse_it(workers: Any, text: Path, crafted: tuple[Path, Path], tmp_path: Path, reader: str) -> None:
    folder, made = crafted
    given = run_settings(text, tmp_path / "run", train={"steps": 1}, eval={"every": 0})
    if reader != "skv-eval":
        given["checkpoint"] = {reader: str(folder)}
    with pytest.raises(JobFailedError, match=f"calls '{NAME}' bytes") as caught:
        workers(1)(*((read_frozen, given, str(folder)) if reader == "skv-eval" else (run_training, given)))
    assert caught.value.kind == "UserError"
    assert not made.exists()


def test_tools_refuse_it(
    crafted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = crafted
    out = tmp_path / "out"
    for main, arguments in (
        (checkpoint_main, ["inspect", folder]),
        (checkpoint_main, ["export", folder, out]),
        (convert_main, ["to-hf", folder, out, "--retention", "1.0"]),
    ):
        monkeypatch.setattr(sys, "argv", ["skv", *map(str, arguments)])
        assert main() == 2
        assert f"calls '{NAME}' bytes" in capsys.readouterr().err
        assert not made.exists()
        assert not out.exists()


def test_the_planner_executes_nothing_either(crafted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made = crafted
    monkeypatch.setattr(SafeReader, "_check", lambda *_: None)
    with pytest.raises(UserError, match="stored as bytes"):
        read_into(folder, {NAME: torch.zeros(32)})
    assert not made.exists()


def test_files_outside_the_manifest_are_not_read(finished: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    torch.save(torch.ones(32), outside)

    def point_outside(metadata: Any, folder: Path) -> None:
        for place in metadata.storage_data:
            if place.fqn == NAME:
                metadata.storage_data[place] = _StorageInfo("../outside", 0, outside.stat().st_size)

    folder = changed(finished, tmp_path / "step_00000001", point_outside)
    for read in (tensor_shapes, lambda path: read_tensors(path, [NAME])):
        with pytest.raises(UserError, match=r"looks for 'model.final_norm.weight' in '\.\./outside'"):
            read(folder)
