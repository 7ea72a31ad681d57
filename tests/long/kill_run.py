"""`kill -9` of all processes at random moments, inside saves too, again and again over one run.

    python -m tests.long.kill_run --kills 50 --processes 2 --out FILE [section.key=value ...]

After each kill everything that is visible is whole; after the last the run goes on to its end and must be, bit by bit,
the run that nobody disturbed: losses, weights, optimizer state. The suite does it with a few kills.
"""

import argparse
import datetime
import importlib.metadata
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import read_tensors, tensor_shapes
from tests.support.processes import Command
from tests.support.runs import lines_of, losses, start, write_text
from tests.support.settings import run_settings

STEPS_PER_KILL = 50
SAVE_EVERY = 2


def _finish(commands: list[Command]) -> str:
    """What the first of them printed, once all have ended well."""
    codes = [command.wait() for command in commands]
    assert not any(codes), [command.printed for command in commands]
    return commands[0].printed


def _wait_for_a_checkpoint(commands: list[Command], root: Path) -> None:
    """Until one more is visible, however long the machine takes. The run may end first."""
    before = files.existing(root)[:1]
    while all(command.returncode is None for command in commands) and files.existing(root)[:1] == before:
        time.sleep(0.01)


def killed_run(
    folder: Path, text: Path, kills: int, processes: int = 1, seed: int = 0, **sections: dict[str, Any]
) -> Counter[str]:
    """Counts of what happened.

    Raises:
        AssertionError: a damaged checkpoint was visible, debris stayed, or the run ended as another one.
    """
    steps = STEPS_PER_KILL * kills

    def given(name: str) -> dict[str, Any]:
        changed = {**sections, "checkpoint": {"every": SAVE_EVERY, **sections.get("checkpoint", {})}}
        changed["train"] = {"steps": steps, "tensorboard": False, **sections.get("train", {})}
        return run_settings(text, folder / name, **{"eval": {"every": 0}, **changed})

    _finish(start(folder / "whole.yaml", given("whole"), processes))
    out = folder / "killed"
    root = out / "checkpoints"
    chance = random.Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(kills):
        started = start(folder / "killed.yaml", given("killed"), processes)
        if chance.random() < 0.1:
            time.sleep(chance.uniform(0, 10))
            seen["killed up to 10 s after the start"] += 1
        else:
            _wait_for_a_checkpoint(started, root)
            time.sleep(chance.uniform(0, 1.0))
        seen["killed while running"] += all(command.returncode is None for command in started)
        for command in started:
            command.send_signal(signal.SIGKILL)
        for command in started:
            command.wait()
        outputs = [command.printed for command in started]
        seen["killed inside a save"] += root.exists() and any(p.name.endswith(".writing") for p in root.iterdir())
        seen["resumed"] += "resumed from" in outputs[0]
        assert "is damaged" not in outputs[0], outputs
        for checkpoint in files.existing(root):
            files.verify(checkpoint)  # what is visible is whole
    last = _finish(start(folder / "killed.yaml", given("killed"), processes))
    assert "resumed from" in last, (seen, last)

    assert [line["step"] for line in lines_of(out)] == list(range(1, steps + 1))
    assert losses(lines_of(out)) == losses(lines_of(folder / "whole"))
    ends = [files.folder_of(folder / name / "checkpoints", steps) for name in ("killed", "whole")]
    names = list(tensor_shapes(ends[0]))
    found, expected = (read_tensors(end, names) for end in ends)
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")]
    return seen


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
            Path(folder), Path(folder) / "text", arguments.kills, arguments.processes, arguments.seed, **sections
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
