"""The runs that a study asks for."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from skv_dist.checkpoint.folder import CONFIG, METRICS
from skv_dist.errors import UserError
from skv_dist.training.callbacks import ENOUGH


class Measurement(NamedTuple):
    """What is measured of a finished run: the arguments of ``skv-eval``, and the file that it writes."""

    arguments: list[str]
    file: Path

    @property
    def output(self) -> Path:
        """What the command says."""
        return self.file.with_suffix(".txt")


@dataclass
class Run:
    """One variant with one seed, and the folder that it writes to."""

    variant: str
    seed: int
    folder: Path
    arguments: list[str]
    share: float  # of a GPU
    cached_layers: list[list[int]] = field(default_factory=list)  # sets of owners to measure behind the last step
    questions: list[str] = field(default_factory=list)  # arguments of ``skv-eval questions``, likewise
    needs: list["Run"] = field(default_factory=list)  # runs whose folders it reads from

    @property
    def maps(self) -> Path:
        """The losses under `cached_layers`, as ``skv-eval --json`` writes them."""
        return self.folder / "maps.json"

    @property
    def answers(self) -> Path:
        """The scores of `questions`."""
        return self.folder / "questions.json"

    @property
    def measurements(self) -> list[Measurement]:
        """What is to be measured behind the last step."""
        asked = []
        if self.cached_layers:
            sets = [text for layers in self.cached_layers for text in ("--cached-layers", *map(str, layers))]
            asked.append(Measurement([str(self.folder), "--json", str(self.maps), *sets], self.maps))
        if self.questions:
            line = ["questions", str(self.folder), *self.questions, "--json", str(self.answers)]
            asked.append(Measurement(line, self.answers))
        return asked

    @property
    def complete(self) -> bool:
        """Whether it came to its end: a run that was asked to stop ends without an error too.

        Its end is the last of its steps, or where nothing got better any more (``eval.patience``), which it says.
        """
        config = yaml.safe_load((self.folder / CONFIG).read_text(encoding="utf-8"))
        lines = (self.folder / METRICS).read_text(encoding="utf-8").splitlines()
        if bool(lines) and json.loads(lines[-1])["step"] == config["train"]["steps"]:
            return True
        return ENOUGH in (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")

    @property
    def record(self) -> dict[str, Any] | None:
        """How it went; None before it is finished."""
        file = self.folder / "run.json"
        return json.loads(file.read_text()) if file.exists() else None


def load(file: Path) -> tuple[dict[str, Any], list[Run]]:
    """A study and its runs, in the order in which they are to be made.

    Raises:
        UserError: the file cannot be read, or is no study.
    """
    try:
        study = yaml.safe_load(file.read_text(encoding="utf-8"))
        runs = []
        for key in ("seeds", "more_seeds"):
            for name, variant in study["variants"].items():
                for seed in study["seeds"] if key == "seeds" else variant.get("more_seeds", []):
                    folder = Path(study["output"], name, str(seed))
                    base = Path(os.path.relpath(file.parent / study["base"]))
                    given = [text.replace("{seed}", str(seed)) for text in variant["set"]]
                    arguments = [str(base), *given, f"train.seed={seed}", f"train.output_dir={folder}"]
                    sets = variant.get("cached_layers", [])
                    questions = [*study.get("questions", []), *variant.get("questions", [])]
                    arguments += ["checkpoint.at_end=true"] if sets or questions else []
                    share = 1 / variant.get("runs_per_gpu", study["runs_per_gpu"])
                    runs.append(Run(name, seed, folder, arguments, share, sets, questions))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{file} is no study: {error!r}; see python -m skv_tools.study --help") from error
    for run in runs:
        run.needs = [
            other for other in runs if other is not run and any(f"{other.folder}/" in text for text in run.arguments)
        ]
    return study, runs
