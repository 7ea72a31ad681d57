"""`kill -9` of all processes at random moments, inside saves too, again and again over one run.

    python -m tests.long.kill_run --kills 50 --processes 2 --out FILE [section.key=value ...]
    python -m tests.long.kill_run --kills 50 --processes 2 --hosts 2 --out FILE [section.key=value ...]

With ``--hosts`` the processes are spread over hosts made of namespaces, and the kill takes all processes of one of
them, drawn anew each time; those of the others have to end by themselves, each with the line that says who is gone.

After each kill everything that is visible is whole; after the last the run goes on to its end and must be, bit by bit,
the run that nobody disturbed: losses, weights, optimizer state. The suite does it with a few, inside saves.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from skv_dist.checkpoint import folder as files
from tests.support.hosts import Host, hosts
from tests.support.killing import SAVE_EVERY, Start, killed_run
from tests.support.processes import Command
from tests.support.runs import start, start_across, write_text

STEPS_PER_KILL = 50


def _wait_for_a_checkpoint(commands: list[Command], root: Path) -> None:
    """Until one more is visible, however long the machine takes. The run may end first."""
    before = files.existing(root)[:1]
    while all(command.returncode is None for command in commands) and files.existing(root)[:1] == before:
        time.sleep(0.01)


def kill_at_random_times(begin: Start, chance: random.Random, root: Path) -> tuple[list[Command], str]:
    commands = begin()
    if chance.random() < 0.1:
        time.sleep(chance.uniform(0, 10))
        return commands, "killed up to 10 s after the start"
    _wait_for_a_checkpoint(commands, root)
    time.sleep(chance.uniform(0, 1.0))
    return commands, "killed up to 1 s after a checkpoint"


ENDS_WITHIN = 60.0  # seconds for the processes of the other hosts, on a machine that has other work too


def kill_a_host(hosts: Sequence[Host], begin: Start, chance: random.Random, root: Path) -> tuple[list[Command], str]:
    """All processes of one host; those of the others are left to notice it."""
    commands, how = kill_at_random_times(begin, chance, root)
    running = all(command.returncode is None for command in commands)
    victim = chance.choice(hosts)
    victim.signal_all(signal.SIGKILL)
    killed = time.monotonic()
    each = len(commands) // len(hosts)
    others = [command for rank, command in enumerate(commands) if rank // each != victim.number]
    if not running:
        return commands, f"{how}; the run had ended"
    while any(command.returncode is None for command in others) and time.monotonic() - killed < ENDS_WITHIN:
        time.sleep(0.05)
    return commands, f"{how}; {_end_of(others, victim.number * each)}"


def _end_of(others: Sequence[Command], lost: int) -> str:
    """How the processes of the other hosts ended, once ``lost``, the first of a host, was killed."""
    codes = [command.returncode for command in others]
    if None in codes:
        return "the others still waited"
    if 0 in codes:
        return "the run had ended"
    if all(f"contact was lost with rank {lost} " in command.printed for command in others):
        assert set(codes) == {2}, codes
        return "the others ended and named the lost host"
    return "the others ended before they had met"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--hosts", type=int, default=0, help="of namespaces; 0: the processes run on this machine")
    parser.add_argument("--steps-per-kill", type=int, default=STEPS_PER_KILL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to add a line to")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    sections: dict[str, dict[str, Any]] = {}
    for override in arguments.overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = yaml.safe_load(value)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as made:
        (Path(folder) / "text").mkdir()
        write_text(Path(folder) / "text")
        kill, begin = kill_at_random_times, start
        if arguments.hosts:
            of_them = made.enter_context(hosts(arguments.hosts, shared=[Path(folder)]))
            kill, begin = partial(kill_a_host, of_them), partial(start_across, of_them)
        seen = killed_run(
            Path(folder),
            Path(folder) / "text",
            arguments.kills,
            kill,
            arguments.steps_per_kill,
            arguments.processes,
            arguments.seed,
            begin,
            **sections,
        )
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "megatron-core", "deepspeed"))
    line = (
        f"- {datetime.date.today()}, {versions}, {time.monotonic() - began:,.0f} s: "
        f"`kill_run {' '.join(sys.argv[1:])}`: {arguments.kills} kills ("
        + ", ".join(f"{name}: {count}" for name, count in seen.items())
        + f"), {arguments.steps_per_kill * arguments.kills} steps, a save every {SAVE_EVERY}; losses, weights and "
        "optimizer state bitwise those of the undisturbed run"
    )
    print(line)
    with arguments.out.open("a") as file:
        file.write(line + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
