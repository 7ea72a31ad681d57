"""How the commands end: by a refusal, by a signal, under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

REFUSES = """
def main(argv):
    raise UserError(argv[0])
"""
WRITES = """
def main(argv):
    import pathlib, time
    from skv_dist.files import new_folder
    with new_folder(pathlib.Path(argv[0])) as unfinished:
        (unfinished / "tokens.bin").write_text("half")
        print("ready", flush=True)
        time.sleep(600)
"""
FRAME = """
import sys
from skv_dist.commands.entry_point import entry_point
from skv_dist.errors import UserError
{body}
sys.argv[0] = "skv-any"
raise SystemExit(entry_point(main)())
"""


def started(body: str, argument: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FRAME.format(body=body), argument]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("number", "code", "line"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_leaves_nothing_half_made(tmp_path: Path, number: signal.Signals, code: int, line: str) -> None:
    process = started(WRITES, str(tmp_path / "out"))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    assert process.communicate()[1] == f"{line}\n"
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []


PREPARES = """
from skv_dist.commands.prepare_data import main
sys.argv[2:] = ["--out", sys.argv[1] + "/out", "--workers", "2"]
sys.argv[1:2] = ["prepare", sys.argv[1] + "/a.jsonl"]
raise SystemExit(main())
"""


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("number", "to_all", "code", "line"),
    [
        pytest.param(signal.SIGINT, True, 130, "interrupted", id="as a terminal sends it"),
        pytest.param(signal.SIGTERM, False, 143, "terminated", id="as kill does"),
        pytest.param(signal.SIGTERM, True, 143, "terminated", id="as Slurm does"),
    ],
)
def test_a_signal_ends_the_workers_of_skv_data(
    tmp_path: Path, number: signal.Signals, to_all: bool, code: int, line: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "once upon a time"}\n' * 1_000_000)
    command = [sys.executable, "-c", FRAME.format(body=PREPARES), str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not any(file.stat().st_size for file in tmp_path.glob(".out.*/tokens.bin")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (os.killpg if to_all else os.kill)(process.pid, number)
        printed = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert printed.splitlines()[-1] == line
    assert "Traceback" not in printed
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
    deadline = time.monotonic() + 20
    while _is_there(process.pid):  # what watches the semaphores of multiprocessing ends after the command
        assert time.monotonic() < deadline
        time.sleep(0.1)


WRITES_TO = """
def main(argv):
    open(argv[0], "w")
"""
TALKS = """
def main(argv):
    print("ready", flush=True)
    sys.stdin.read()
    for _ in range(int(argv[0])):
        print("more")
"""


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    process = started(WRITES_TO, str(tmp_path / "no" / "file.json"))
    assert process.communicate()[1] == f"skv-any: error: {tmp_path}/no/file.json: No such file or directory\n"
    assert process.returncode == 2


SUCCEEDS = """
def main(argv):
    print("done")
    return 0
"""


def test_a_closed_output_is_no_failure() -> None:
    command = f"exec '{sys.executable}' -c \"$0\" >&-"
    done = subprocess.run(["sh", "-c", command, FRAME.format(body=SUCCEEDS)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


LOSES_ANOTHER_PIPE = """
def main(argv):
    raise BrokenPipeError(32, argv[0])
"""


def test_another_broken_pipe_is_no_quiet_end() -> None:
    process = started(LOSES_ANOTHER_PIPE, "to a worker")
    assert "to a worker" in process.communicate()[1]
    assert process.returncode == 1


@pytest.mark.parametrize("lines", ["2", "100000"], ids=["found out at the end", "found out on the way"])
def test_a_reader_may_leave(lines: str) -> None:
    """As ``skv-data show ... | head -1`` does."""
    command = [sys.executable, "-c", FRAME.format(body=TALKS), lines]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_refusal_is_printed_once_on_a_host_under_torchrun(tmp_path: Path) -> None:
    printed, codes = [], []
    for rank, message in enumerate(["no such file", "no such file", "another"]):
        folder = tmp_path / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        process = started(REFUSES, message, TORCHELASTIC_ERROR_FILE=str(folder / "error.json"))
        printed.append(process.communicate()[1])
        codes.append(process.returncode)
        assert json.loads((folder / "error.json").read_text())["message"]["message"] == f"skv-any: error: {message}"
    assert printed == ["skv-any: error: no such file\n", "", "skv-any: error: another\n"]
    assert codes == [2, 2, 2]


def test_a_refusal_is_printed_once_on_a_host_under_deepspeed(tmp_path: Path) -> None:
    """Whose processes have a launcher in common and nothing else; the next launcher clears up behind it."""
    variables = {"CROSS_RANK": "1", "LOCAL_SIZE": "2", "TMPDIR": str(tmp_path)}
    runs = [started(REFUSES, message, **variables) for message in ("no such file", "no such file", "another")]
    printed = sorted(process.communicate()[1] for process in runs)
    assert printed == ["", "skv-any: error: another\n", "skv-any: error: no such file\n"]
    assert len(list(tmp_path.iterdir())) == 2
    launcher = "import subprocess, sys; raise SystemExit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"
    for _ in range(2):
        command = [sys.executable, "-c", launcher, FRAME.format(body=REFUSES), "no such file"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
        assert done.stderr == "skv-any: error: no such file\n"
    assert len(list(tmp_path.iterdir())) == 3  # of the launcher before the last one nothing is left


WANTS_A_NUMBER = """
def main(argv):
    from skv_dist.commands.arguments import ArgumentParser
    parser = ArgumentParser(prog="skv-any")
    parser.add_argument("--number", type=int)
    parser.parse_args(["--number", *argv])
"""


def test_a_wrong_argument_is_told_once_on_a_host(tmp_path: Path) -> None:
    runs = [started(WANTS_A_NUMBER, "x", CROSS_RANK="0", LOCAL_SIZE="2", TMPDIR=str(tmp_path)) for _ in range(2)]
    printed = sorted(process.communicate()[1] for process in runs)
    line = "usage: skv-any [-h] [--number NUMBER]\nskv-any: error: argument --number: invalid int value: 'x'\n"
    assert printed == ["", line]
    assert [process.returncode for process in runs] == [2, 2]


def test_a_refusal_is_never_lost(tmp_path: Path) -> None:
    process = started(REFUSES, "no", TORCHELASTIC_ERROR_FILE=str(tmp_path / "gone" / "0" / "error.json"))
    assert process.communicate()[1] == "skv-any: error: no\n"
    assert process.returncode == 2


def told_to_torchrun(folder: str) -> tuple[str, int]:
    """torchrun's summary, made of the error file, and the time by which it finds the first failure."""
    from unittest import mock

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from skv_dist.parallel.processes.report import report_once

    file = f"{folder}/0/error.json"
    os.makedirs(os.path.dirname(file))
    with mock.patch.dict(os.environ, {"TORCHELASTIC_ERROR_FILE": file}):
        report_once("skv-train: error: no such file")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=file)
    return ChildFailedError("skv-train", {0: failure}).format_msg(), failure.timestamp


def test_torchrun_repeats_the_refusal_in_its_summary(workers: Any, tmp_path: Path) -> None:
    summary, timestamp = workers(1)(told_to_torchrun, str(tmp_path))[0]
    assert "traceback : skv-train: error: no such file\n" in summary
    assert timestamp > 0
