"""What goes wrong on one host, and how the processes of the other end: once for each fault, measured.

    python -m tests.long.fault_run --out FILE [FAULT ...]

Two hosts of namespaces with two tensor-parallel ranks each, a pipeline across. A fault has to end the processes of the
other host with exit code 2 and one line that names the ranks and the host that are gone; what is no fault (a slow
link, a process that lets none of its threads run for longer than any time-out) has to end nothing.
"""

import argparse
import contextlib
import ctypes
import datetime
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.hosts import Host, hosts
from tests.support.processes import Command, ended, wait_until
from tests.support.runs import has_stepped, lines_of, losses, start_across, write_text
from tests.support.settings import run_settings

LONGEST = 200.0  # seconds for any of them to end
HOLDS = 70.0  # seconds, longer than whatever a lost process is known after


class Ends(NamedTuple):
    """Seconds from the fault to each end, and the exit codes, of the processes that were left; what they printed."""

    seconds: list[float]
    codes: list[int | None]
    printed: list[str]

    def check(self, *parts: str) -> str:
        """The one line in which each of them says why it ended; ``parts`` have to be in it, in this order."""
        assert set(self.codes) == {2}, (self.codes, self.printed)
        found = {line for text in self.printed for line in text.splitlines() if "error: " in line}
        assert len(found) == 1, (found, self.printed)
        line = found.pop().partition("error: ")[2]
        places = [line.find(part) for part in parts]
        assert -1 not in places, (parts, line)
        assert places == sorted(places), (parts, line)
        assert not any("Traceback" in text for text in self.printed), self.printed
        return f"{min(self.seconds):.0f} to {max(self.seconds):.0f} s | `{line}`"


def ends_of(commands: Sequence[Command], began: float) -> Ends:
    seconds = [0.0] * len(commands)
    while not all(seconds) and time.monotonic() - began < LONGEST:
        for number, command in enumerate(commands):
            if not seconds[number] and command.returncode is not None:
                seconds[number] = time.monotonic() - began
        time.sleep(0.05)
    return Ends(seconds, [command.returncode for command in commands], [command.printed for command in commands])


class Trial:
    """A run over two hosts in a folder that they share."""

    def __init__(self, folder: Path, network: Sequence[Host]) -> None:
        self.folder, self.hosts, self.out = folder, network, folder / "run"
        (folder / "text").mkdir()
        write_text(folder / "text")

    def settings(self, steps: int, out: Path | None = None, **sections: dict[str, Any]) -> dict[str, Any]:
        own: dict[str, dict[str, Any]] = {
            "parallel": {"tensor": 2, "pipeline": 2},
            "model": {"num_layers": 4},
            "train": {"steps": steps, "tensorboard": False},
            "eval": {"every": 0},
        }
        merged = {name: {**own.get(name, {}), **sections.get(name, {})} for name in {**own, **sections}}
        return run_settings(self.folder / "text", out or self.out, **merged)

    def start(
        self, given: dict[str, Any], first: Mapping[int, Callable[[], None]] | None = None, name: str = "run"
    ) -> list[Command]:
        return start_across(self.hosts, self.folder / f"{name}.yaml", given, 4, first)

    def running(self, first: Mapping[int, Callable[[], None]] | None = None) -> list[Command]:
        """Which has made steps, and goes on."""
        commands = self.start(self.settings(100_000), first)
        wait_until(lambda: has_stepped(self.out), commands)
        return commands


BOTH_OF = {name: ("contact was lost with rank", f" on {name}") for name in ("alder", "birch")}


def a_host_is_killed(trial: Trial, victim: int) -> str:
    commands = trial.running()
    with ended(commands):
        trial.hosts[victim].signal_all(signal.SIGKILL)
        others = commands[2:] if victim == 0 else commands[:2]
        ranks = ["rank 0 "] if victim == 0 else ["rank 2 ", "rank 3 "]  # the first is the one that knows of others
        return ends_of(others, time.monotonic()).check(*ranks, f" on {trial.hosts[victim].name}")


def a_process_is_killed(trial: Trial) -> str:
    commands = trial.running()
    with ended(commands):
        commands[3].send_signal(signal.SIGKILL)
        return ends_of(commands[:3], time.monotonic()).check("rank 3 (stage 1, replica 0, tensor rank 1) on birch")


def a_link_goes_down(trial: Trial) -> str:
    commands = trial.running()
    with ended(commands):
        trial.hosts[1].link(up=False)
        began = time.monotonic()
        here = ends_of(commands[:2], began).check("rank 2 ", "rank 3 ", " on birch")
        there = ends_of(commands[2:], began).check("rank 0 ", " on alder")
        return f"{here}; on the other side {there.replace(' | ', ', ')}"


def a_process_is_stopped(trial: Trial, rank: int) -> str:
    commands = trial.running({rank: partial(stops_itself_at, 5)})
    with ended(commands):
        began = time.monotonic()
        host = trial.hosts[rank // 2].name
        return ends_of([c for other, c in enumerate(commands) if other != rank], began).check(f"rank {rank} ", host)


def all_of_a_host_is_stopped(trial: Trial) -> str:
    commands = trial.running()
    with ended(commands):
        trial.hosts[1].signal_all(signal.SIGSTOP)
        return ends_of(commands[:2], time.monotonic()).check("rank 2 ", "rank 3 ", " on birch")


def _at_step(step: int, do: Callable[[], object]) -> None:
    """This process does something when it has made so many steps."""
    from skv_dist.training.trainer import Trainer

    right = Trainer._finish

    def finish(self: Any, launched: Any) -> Any:
        metrics = right(self, launched)
        if self.step == step:
            do()
        return metrics

    Trainer._finish = finish  # type: ignore[method-assign]


def stops_itself_at(step: int) -> None:
    import os

    _at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def lets_no_thread_run_at(step: int) -> None:
    _at_step(step, partial(ctypes.PyDLL(None).sleep, int(HOLDS)))  # PyDLL keeps Python's lock


def _undisturbed(trial: Trial, disturb: Callable[[Trial], None] = lambda _: None, **first: Any) -> str:
    """A run of 20 steps ends as the same run without what disturbs it, which is told how long it took."""
    for name, what, does in (("plain", lambda _: None, None), ("disturbed", disturb, first.get("first"))):
        what(trial)
        commands = trial.start(trial.settings(20, trial.folder / name), does, name)
        with ended(commands):
            codes = [command.wait() for command in commands]
        assert not any(codes), [command.printed for command in commands]
    plain, disturbed = (lines_of(trial.folder / name) for name in ("plain", "disturbed"))
    assert losses(plain) == losses(disturbed)
    seconds = [
        sum(line["tokens"] / step / line["tokens_per_second"] for step, line in enumerate(lines, 1))
        for lines in (plain, disturbed)
    ]
    return f"nothing ends; {seconds[1]:.1f} s for 20 steps in place of {seconds[0]:.1f} | the same losses, bit by bit"


def a_slow_link(trial: Trial) -> str:
    return _undisturbed(trial, lambda trial: trial.hosts[1].throttle("100kbit"))


def a_busy_process(trial: Trial, rank: int) -> str:
    return _undisturbed(trial, first={rank: partial(lets_no_thread_run_at, 5)})


def a_full_disk(trial: Trial) -> str:
    """Each host prepares the data on a disk of its own, and that of one is full."""
    trial.hosts[1].run(
        "mkdir /tmp/cache; mount -t tmpfs -o size=64k none /tmp/cache; head -c 64k /dev/zero > /tmp/cache/x"
    )
    commands = trial.start(trial.settings(20, data={"cache_dir": "/tmp/cache"}))
    with ended(commands):
        wait_until(lambda: any("error: " in c.printed for c in commands[2:]), commands[:2])
        began = time.monotonic()
        there = ends_of(commands[2:], began)
        assert set(there.codes) == {2}, (there, [command.printed for command in commands[:2]])
        here = ends_of(commands[:2], began).check("rank 2 ", " on birch")
        said = next(line for text in there.printed for line in text.splitlines() if "error: " in line)
        return f"{here}; there: `{said.partition('error: ')[2]}`"


def no_folder_in_common(trial: Trial) -> str:
    commands = trial.start(trial.settings(20, Path("/tmp/run")))
    with ended(commands):
        return ends_of(commands, time.monotonic()).check(
            "train.output_dir /tmp/run is not one folder", "on birch", "on alder"
        )


FAULTS: dict[str, Callable[[Trial], str]] = {
    "all processes of the other host are killed": partial(a_host_is_killed, victim=1),
    "all processes of rank 0's host are killed": partial(a_host_is_killed, victim=0),
    "one process is killed": a_process_is_killed,
    "the link goes down": a_link_goes_down,
    "a process is stopped": partial(a_process_is_stopped, rank=3),
    "rank 0 is stopped": partial(a_process_is_stopped, rank=0),
    "all of a host is stopped": all_of_a_host_is_stopped,
    "one host's own disk is full while it prepares": a_full_disk,
    "the hosts have no folder in common": no_folder_in_common,
    "a link of 100 kbit/s": a_slow_link,
    f"a process lets no thread run for {HOLDS:.0f} s": partial(a_busy_process, rank=3),
    f"rank 0 lets no thread run for {HOLDS:.0f} s": partial(a_busy_process, rank=0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to add lines to")
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="words of the ones to try; default: all")
    arguments = parser.parse_args()
    failed = 0
    for name, fault in FAULTS.items():
        if arguments.faults and not any(word in name for word in arguments.faults):
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as made:
            trial = Trial(Path(folder), made.enter_context(hosts(2, shared=[Path(folder)])))
            try:
                result = fault(trial)
            except AssertionError as error:
                failed += 1
                result = f"FAILED | {error}"
        line = f"| {name} | {result} |"
        print(f"{datetime.datetime.now():%H:%M:%S} {line}", file=sys.stderr, flush=True)
        with arguments.out.open("a") as file:
            file.write(line + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
