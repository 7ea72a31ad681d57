"""Running an exported folder in an inference engine, with that engine's own Python."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skv_dist.errors import UserError

from ..engines import runners

Arrays = dict[str, npt.NDArray[Any]]

_FOLDER = Path(runners.__file__).parent
ENGINES = ("transformers", "onnx", "mlx", "vllm")  # those with a runner that takes an exported folder


class CommandError(UserError):
    """A command failed; ``printed`` is all that it said."""

    def __init__(self, message: str, printed: str) -> None:
        super().__init__(message)
        self.printed = printed


def run_engine(engine: str, python: str, folder: Path, tokens: Path, out: Path, *options: str) -> Arrays:
    """The arrays that the runner of ``engine`` writes to ``out``; its own text says which.

    Args:
        tokens: a ``.npy`` file of int64 [sequences, tokens].

    Raises:
        CommandError: the engine failed.
        UserError: ``python`` cannot be run.
    """
    try:
        run_command([python, str(_FOLDER / f"run_{engine}.py"), str(folder), str(tokens), str(out), *options])
    except CommandError as error:
        raise CommandError(f"{engine} cannot run {folder}: {error}", error.printed) from error
    with np.load(out) as arrays:
        return dict(arrays)


def require(python: str, module: str, cure: str) -> None:
    """Raises UserError where the interpreter ``python`` cannot import ``module``, with the ``cure``."""
    if python == sys.executable:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{python} has no module {module}: {cure}")
        return
    try:
        run_command([python, "-c", f"import {module}"])
    except CommandError as error:
        raise UserError(f"{python} cannot import {module} ({error}): {cure}") from error


def run_command(command: Sequence[str], **environment: str) -> str:
    """What it prints to standard output.

    Raises:
        CommandError: it failed. The message is the line that says why.
        UserError: there is no such program.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    except OSError as error:
        raise UserError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        cause = ": the system may be out of memory" if name == "SIGKILL" else ""
        raise CommandError(f"it was ended by {name}{cause}", done.stdout + done.stderr)
    if done.returncode:
        raise CommandError(_last_error(done.stderr), done.stdout + done.stderr)
    return done.stdout


def _last_error(printed: str) -> str:
    """The last line that names an error; vLLM's progress bars come after it."""
    lines = printed.strip().splitlines() or ["it failed and said nothing"]
    return next((line for line in reversed(lines) if "Error: " in line), lines[-1])
