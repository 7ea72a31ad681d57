"""Signals in a run: the first ends it behind the step, a second Ctrl-C at once, whatever the main thread does."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support.runs import lines_of
from tests.support.settings import run_settings

STEPS = """
import time
while not stop.weight:
    time.sleep(0.01)
time.sleep(0.3)
from skv_dist.training.stop import BY_WEIGHT
print(BY_WEIGHT[stop.weight].name)
"""
# A collective that does not end: the main thread never comes back to Python.
STUCK = """
import ctypes
mutex = ctypes.create_string_buffer(64)
for _ in range(2):
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def started(body: str, before: str = "") -> subprocess.Popen[str]:
    code = f"import signal\nfrom skv_dist.training.stop import StopRequest\n{before}\nstop = StopRequest()\n"
    code += f"stop.defer(says_so=True)\nprint('ready', flush=True)\n{body}"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("signals", "name"),
    [
        ([signal.SIGTERM], "SIGTERM"),
        ([signal.SIGTERM, signal.SIGTERM], "SIGTERM"),  # from Slurm and from torchrun
        ([signal.SIGINT], "SIGINT"),
    ],
)
def test_a_signal_asks_for_the_end_and_does_not_end_the_process(signals: list[signal.Signals], name: str) -> None:
    process = started(STEPS)
    for number in signals:
        process.send_signal(number)
    printed, said = process.communicate()
    assert process.returncode == 0
    assert printed.strip() == name
    assert said == ("stopping after this step; Ctrl-C again ends at once\n" if name == "SIGINT" else "")


@pytest.mark.parametrize("again", [signal.SIGINT, signal.SIGTERM])  # torchrun passes a second Ctrl-C on as SIGTERM
def test_a_second_ctrl_c_ends_a_process_that_is_stuck(again: signal.Signals) -> None:
    process = started(STUCK)
    process.send_signal(signal.SIGINT)
    while process.poll() is None:  # a second one within a second is the first, passed on twice
        time.sleep(0.4)
        process.send_signal(again)
    assert process.returncode == 130
    assert process.communicate()[1].endswith("interrupted again: ending at once\n")


def test_one_ctrl_c_that_a_launcher_passes_on_twice_is_one() -> None:
    from skv_dist.training.stop import BY_WEIGHT, StopRequest

    stop = StopRequest()
    with mock.patch("time.monotonic", return_value=7.0), mock.patch("os._exit", side_effect=AssertionError):
        stop._take(signal.SIGTERM)
        stop._take(signal.SIGINT)
        stop._take(signal.SIGTERM)
    assert BY_WEIGHT[stop.weight] == signal.SIGINT
    with mock.patch("time.monotonic", return_value=8.5), mock.patch("os._exit") as ended:
        stop._take(signal.SIGTERM)
    ended.assert_called_once_with(130)


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    process = started(STEPS, before="signal.signal(signal.SIGINT, signal.SIG_IGN)")
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    assert process.communicate() == ("SIGTERM\n", "")


def test_handlers_are_put_back() -> None:
    from skv_dist.training.stop import StopRequest

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        stop.defer(says_so=False)
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def interrupted_training(settings: dict[str, Any], number: int) -> int | None:
    """A run whose last process alone gets a signal, over and over from its second step on, also in the last save."""
    import os

    import torch.distributed as dist

    from skv_dist.checkpoint.save import Saver
    from skv_dist.commands.train import train
    from skv_dist.config.run import RunConfig
    from skv_dist.parallel.processes import groups
    from skv_dist.training.callbacks import Checkpoints

    def signal_once() -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), number)

    on_step, save = Checkpoints.on_step, Saver.save

    def hurt_step(self: Any, step: int, metrics: Any) -> None:
        on_step(self, step, metrics)
        if step == 2:
            signal_once()

    def hurt_save(self: Any, *arguments: Any) -> None:
        save(self, *arguments)
        if number == signal.SIGTERM:
            signal_once()

    try:
        with mock.patch.object(Checkpoints, "on_step", hurt_step), mock.patch.object(Saver, "save", hurt_save):
            return train(RunConfig.model_validate(settings))
    finally:
        groups.leave_model_parallel()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_one_process_stops_all_and_the_step_is_saved(
    workers: Any, text: Path, tmp_path: Path, number: signal.Signals
) -> None:
    given = run_settings(text, tmp_path / "run", train={"steps": 100000}, eval={"every": 0}, parallel={"zero_stage": 0})
    assert workers(2)(interrupted_training, given, number) == [number, number]
    num_steps = len(lines_of(tmp_path / "run"))
    assert 3 <= num_steps < 100000
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == [f"step_{num_steps:08d}"]
