"""Preparing by several processes: those of one command, and those that want the same set."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from skv_dist.config.data import SourceConfig
from skv_dist.data import making
from skv_dist.data.encoders import encoded
from skv_dist.data.making import made_once
from skv_dist.data.token_set import PreparedSet
from skv_dist.data.tokenize import prepare, prepared_once
from skv_dist.data.tokenizer import ByteTokenizer
from skv_dist.errors import UserError

TEXTS = [f"document {i} " * (i % 50) for i in range(3000)]


class CountingTokenizer(ByteTokenizer):
    """Leaves a file each time that it is unpacked, and ends its process at one text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.folder = state["folder"]
        (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()

    def encode(self, text: str) -> np.ndarray:
        if text == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text)


def test_workers_get_the_tokenizer_once_and_a_killed_one_is_noticed(tmp_path: Path) -> None:
    one = list(encoded(TEXTS, CountingTokenizer(tmp_path), 1))
    two = list(encoded(TEXTS, CountingTokenizer(tmp_path), 2))
    assert [document.ids.tolist() for document in one] == [document.ids.tolist() for document in two]
    assert [document.text_hash for document in one] == [document.text_hash for document in two]
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match=r"a tokenizing process was killed.*lower --workers"):
        list(encoded(["a", "kill", *TEXTS], CountingTokenizer(tmp_path), 2))


def _source(folder: Path) -> SourceConfig:
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:50]))
    return SourceConfig(path=str(folder), format="jsonl")


def test_ten_that_want_the_same_set_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    out = tmp_path / "deep" / "out"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".out.77.writing").mkdir()  # of a killed process

    def make() -> None:
        made.append(1)
        assert [path.name for path in out.parent.iterdir()] == [".out.lock"]
        time.sleep(0.3)
        out.mkdir()

    threads = [threading.Thread(target=made_once, args=(out, make)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_raw_source_is_prepared_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _source(tmp_path / "raw")
    keys = {"workers": 1, "cache_dir": str(tmp_path / "cache"), "max_skipped": 0.1}
    folder = prepared_once(source, ByteTokenizer(), **keys)
    marked = folder / "meta.json"
    before = marked.stat().st_mtime_ns
    assert prepared_once(source, ByteTokenizer(), **keys) == folder
    assert marked.stat().st_mtime_ns == before
    assert PreparedSet(folder, ByteTokenizer()).num_documents == 49

    class Renamed(ByteTokenizer):
        def fingerprint(self) -> str:
            return "byte-v2"

        def fingerprints(self) -> list[str]:
            return ["byte-v2", "byte-v1"]

    assert prepared_once(source, Renamed(), **keys) == folder  # known under its earlier fingerprint


@pytest.mark.parametrize("pid", [2**22 + 1, 1])
def test_an_abandoned_lock_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: int) -> None:
    """The lock of a process that is not there, and one that nobody touches any more."""
    for name in ("_ABANDONED_SECONDS", "_ABANDONED_HERE_SECONDS"):
        monkeypatch.setattr(making, name, 0.1)
    lock = tmp_path / ".out.lock"
    lock.write_text(f"{socket.gethostname()} {pid}\n")
    assert made_once(tmp_path / "out", (tmp_path / "out").mkdir) == tmp_path / "out"
    assert not lock.exists()


def test_a_command_goes_on_after_one_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "_ABANDONED_HERE_SECONDS", 0.1)
    (tmp_path / ".out.lock").write_text(f"{socket.gethostname()} {2**22 + 1}\n")
    (tmp_path / ".out.77.writing").mkdir()
    prepare([_source(tmp_path / "raw")], ByteTokenizer(), tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_a_lock_that_is_touched_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(making, "_ABANDONED_SECONDS", 1.5)
    lock, out = tmp_path / ".out.lock", tmp_path / "out"
    lock.write_text("elsewhere 12\n")

    def work() -> None:
        for _ in range(60):
            os.utime(lock)
            time.sleep(0.05)
        out.mkdir()

    thread = threading.Thread(target=work)
    thread.start()
    assert made_once(out, lambda: pytest.fail("made a second time")) == out
    thread.join()
    assert "which process 12 on elsewhere prepares" in capsys.readouterr().out


def test_a_lost_race_uses_what_the_winner_made(tmp_path: Path) -> None:
    source = _source(tmp_path / "raw")
    out = tmp_path / "out"

    def lose() -> None:
        prepare([source], ByteTokenizer(), tmp_path / "other", progress=False)
        (tmp_path / "other").rename(out)
        raise UserError("cannot write out: Directory not empty")

    assert made_once(out, lose) == out

    def fail() -> None:
        raise UserError("broken source")

    with pytest.raises(UserError, match="broken source"):
        made_once(tmp_path / "never", fail)
    assert not (tmp_path / ".never.lock").exists()


def test_two_commands_do_not_make_one_folder(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("elsewhere 12\n")
    with pytest.raises(UserError, match=r"out is being made by process 12 on elsewhere: wait for it, or remove .*lock"):
        prepare([_source(tmp_path / "raw")], ByteTokenizer(), tmp_path / "out", progress=False)
    assert (tmp_path / ".out.lock").exists()


def test_a_disk_that_is_full_refuses_and_leaves_no_lock(tmp_path: Path) -> None:
    """It may have room for the name of the lock, and none for what is in it."""
    opened = os.open

    def full(path: Path, flags: int) -> int:
        os.close(opened(path, flags))
        return opened("/dev/full", os.O_WRONLY)

    with (
        mock.patch.object(os, "open", full),
        pytest.raises(UserError, match=r"cannot write .*/set: No space left on device"),
        making.making(tmp_path / "set"),
    ):
        raise AssertionError("the lock was taken")
    assert list(tmp_path.iterdir()) == []
