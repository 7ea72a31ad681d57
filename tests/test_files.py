"""Folders and files that appear whole or not at all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from skv_dist.errors import UserError
from skv_dist.files import new_folder, replace_text


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def ended_process() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_appears_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as unfinished:
        (unfinished / "file").write_text("content")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "content"
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    with pytest.raises(ValueError, match="midway"), new_folder(tmp_path / "other"):
        raise ValueError("midway")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_killed_processes_go_and_those_of_others_stay(tmp_path: Path) -> None:
    host = socket.gethostname()
    names = {
        "killed": f".out.{host}.{ended_process()}.writing",
        "running": f".out.{host}.{os.getppid()}.writing",
        "elsewhere": f".out.another-host.{os.getpid()}.writing",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("")
    with new_folder(tmp_path / "out"):
        assert hidden(tmp_path) == sorted([names["running"], names["elsewhere"], f".out.{host}.{os.getpid()}.writing"])
    assert hidden(tmp_path) == sorted([names["running"], names["elsewhere"]])
    assert (tmp_path / names["elsewhere"] / "part").exists()


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "latest"
    replace_text(file, "old\n")
    replace_text(file, "new\n")
    assert file.read_text() == "new\n"
    assert hidden(tmp_path) == []
