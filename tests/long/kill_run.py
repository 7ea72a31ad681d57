"""`kill -9` of all processes at random moments, inside saves too, again and again over one run.

    python -m tests.long.kill_run --kills 50 --processes 2 --out FILE [section.key=value ...]

After each kill everything that is visible is whole; after the last the run goes on to its end and must be, bit by bit,
the run that nobody disturbed: losses, weights, optimizer state. The suite does it with a few, inside saves.
"""

import argparse
import datetime
import importlib.metadata
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from skv_dist.checkpoint import folder as files
from tests.support.killing import SAVE_EVERY, Start, killed_run
from tests.support.processes import Command
from tests.support.runs import write_text

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
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
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").mkdir()
        write_text(Path(folder) / "text")
        seen = killed_run(
            Path(folder),
            Path(folder) / "text",
            arguments.kills,
            kill_at_random_times,
            STEPS_PER_KILL,
            arguments.processes,
            arguments.seed,
            **sections,
        )
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "megatron-core", "deepspeed"))
    line = (
        f"- {datetime.date.today()}, {versions}, {time.monotonic() - began:,.0f} s: "
        f"`kill_run {' '.join(sys.argv[1:])}`: {arguments.kills} kills ("
        + ", ".join(f"{name}: {count}" for name, count in seen.items())
        + f"), {STEPS_PER_KILL * arguments.kills} steps, a save every {SAVE_EVERY}; losses, weights and optimizer "
        "state bitwise those of the undisturbed run"
    )
    print(line)
    with arguments.out.open("a") as file:
        file.write(line + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
