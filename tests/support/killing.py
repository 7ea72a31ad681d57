"""A run whose processes are killed again and again, against the run that nobody disturbed."""

import itertools
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import read_tensors, tensor_shapes
from tests.support.processes import Command
from tests.support.runs import lines_of, losses, start
from tests.support.settings import run_settings

SAVE_EVERY = 2

Start = Callable[..., list[Command]]  # of the processes; takes what each does first, by rank
Killer = Callable[[Start, random.Random, Path], tuple[list[Command], str]]


def dies_at_call(number: int) -> None:
    """This process is killed when it asks the disk for the ``number``-th time to keep or to name a file."""
    calls = itertools.count(1)

    def counted(right: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return right(*arguments, **keywords)

        return call

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))


def kill_inside_saves(begin: Start, chance: random.Random, root: Path) -> tuple[list[Command], str]:
    """One process at a random step of the protocol by which it writes: no clock, no speed decides where."""
    first = chance.random() < 0.7  # which writes more: the manifest, the names
    commands = begin(
        {0: partial(dies_at_call, chance.randint(1, 30))} if first else {1: partial(dies_at_call, chance.randint(1, 4))}
    )
    assert commands[0 if first else 1].wait() == -signal.SIGKILL
    return commands, "rank 0 died" if first else "rank 1 died"


def killed_run(
    folder: Path,
    text: Path,
    kills: int,
    kill: Killer,
    steps_per_kill: int,
    processes: int = 1,
    seed: int = 0,
    begin: Callable[..., list[Command]] = start,
    **sections: dict[str, Any],
) -> Counter[str]:
    """Counts of what happened.

    Args:
        kill: waits, and kills at least one process of the run.
        begin: starts the processes, as `tests.support.runs.start`.
        sections: of the configuration.

    Raises:
        AssertionError: a damaged checkpoint was visible, debris stayed, or the run ended as another one.
    """
    steps = steps_per_kill * kills

    def given(name: str) -> dict[str, Any]:
        changed = {**sections, "checkpoint": {"every": SAVE_EVERY, **sections.get("checkpoint", {})}}
        changed["train"] = {"steps": steps, "tensorboard": False, **sections.get("train", {})}
        return run_settings(text, folder / name, **{"eval": {"every": 0}, **changed})

    _finish(begin(folder / "whole.yaml", given("whole"), processes))
    out = folder / "killed"
    root = out / "checkpoints"
    chance = random.Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(kills):
        commands, how = kill(partial(begin, folder / "killed.yaml", given("killed"), processes), chance, root)
        seen.update(how.split("; "))
        for command in commands:
            command.send_signal(signal.SIGKILL)
        seen["killed while running"] += all(command.wait() for command in commands)
        seen["killed inside a save"] += root.exists() and any(p.name.endswith(".writing") for p in root.iterdir())
        seen["resumed"] += "resumed from" in commands[0].printed
        assert "is damaged" not in commands[0].printed, commands[0].printed
        for checkpoint in files.existing(root):
            files.verify(checkpoint)  # what is visible is whole
    last = _finish(begin(folder / "killed.yaml", given("killed"), processes))
    assert "resumed from" in last, (seen, last)

    assert [line["step"] for line in lines_of(out)] == list(range(1, steps + 1))
    assert losses(lines_of(out)) == losses(lines_of(folder / "whole"))
    ends = [files.folder_of(folder / name / "checkpoints", steps) for name in ("killed", "whole")]
    names = list(tensor_shapes(ends[0]))
    found, expected = (read_tensors(end, names) for end in ends)
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")]
    return seen


def _finish(commands: list[Command]) -> str:
    """What the first of them printed, once all have ended well."""
    codes = [command.wait() for command in commands]
    assert not any(codes), [command.printed for command in commands]
    return commands[0].printed
