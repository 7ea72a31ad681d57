"""The runs that a study asks for."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from skv_dist.errors import UserError


@dataclass
class Run:
    """One variant with one seed, and the folder that it writes to."""

    variant: str
    seed: int
    folder: Path
    arguments: list[str]
    share: float  # of a GPU
    cached_layers: list[list[int]] = field(default_factory=list)  # sets of owners to measure behind the last step

    @property
    def maps(self) -> Path:
        """The losses under `cached_layers`, as ``skv-eval --json`` writes them."""
        return self.folder / "maps.json"

    @property
    def evaluation(self) -> list[str]:
        """The arguments of ``skv-eval`` for `cached_layers`."""
        steps = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))["train"]["steps"]
        line = [str(self.folder / "checkpoints" / f"step_{steps:08d}"), "--json", str(self.maps)]
        return line + [text for layers in self.cached_layers for text in ("--cached-layers", *map(str, layers))]

    @property
    def complete(self) -> bool:
        """Whether its last step is in its metrics: a run that was asked to stop ends without an error too."""
        config = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return bool(lines) and json.loads(lines[-1])["step"] == config["train"]["steps"]

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
                    arguments = [str(base), *variant["set"], f"train.seed={seed}", f"train.output_dir={folder}"]
                    sets = variant.get("cached_layers", [])
                    arguments += ["checkpoint.at_end=true"] if sets else []
                    share = 1 / variant.get("runs_per_gpu", study["runs_per_gpu"])
                    runs.append(Run(name, seed, folder, arguments, share, sets))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{file} is no study: {error!r}; see python -m skv_tools.study --help") from error
    return study, runs
