"""The page about a study: what `skv_tools.study` found, as Markdown."""

import json
import math
import os
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from skv_dist.checkpoint.folder import CONFIG, METRICS
from skv_dist.errors import UserError
from skv_dist.evaluation.comparison import losses_by_retention

from .runs import Run

LAYERS = "loss@layers "
# Student's t at 97.5 %, by degrees of freedom
_T = [math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
_LOSSES = """Validation loss in nats per token after the last step of each run, mean ± standard deviation over seeds.
All runs are measured on the same text."""
_SCORES = """Answers to held-out questions, decoded with the cache of the owners alone; percent, mean ± standard
deviation over seeds, and differences paired by seed."""
_DIFFERENCES = """A seed fixes the initial weights and the order of the training text. In brackets: the standard error
of the mean difference, and its 95 % interval by Student's t, which is wide with few seeds. Bold: beyond two standard
errors."""


class Result:
    """What a finished run left in its folder."""

    def __init__(self, folder: Path) -> None:
        lines = map(json.loads, (folder / METRICS).read_text(encoding="utf-8").splitlines())
        self.metrics: list[dict[str, Any]] = list(lines)
        self.output = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        self.config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        answers = folder / "questions.json"
        self.scores: dict[str, dict[str, float]] = (
            json.loads(answers.read_text(encoding="utf-8")) if answers.exists() else {}
        )  # map to F1 and exact match, in percent
        self.losses: dict[int, dict[str, float]] = {}  # step to retention to loss
        maps = folder / "maps.json"
        at_maps = json.loads(maps.read_text(encoding="utf-8")) if maps.exists() else {}
        self.maps = {name.removeprefix(LAYERS): loss for name, loss in at_maps.items() if name.startswith(LAYERS)}
        for line in self.metrics:
            values = losses_by_retention(line)
            if values:
                self.losses[line["step"]] = values

    @property
    def last(self) -> dict[str, float]:
        """The losses after the last step, by retention."""
        return self.losses[max(self.losses)]

    def said(self, name: str) -> str:
        """A line of the report with which the trainer starts."""
        return next((text.partition(":")[2].strip() for text in self.output if text.startswith(f"{name}:")), "unknown")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def spread(values: Sequence[float], digits: int = 3) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}" if values else ""


def _score_differences(
    results: dict[tuple[str, int], Result],
    one: str,
    other: str,
    seeds: Sequence[int],
    maps: Sequence[str],
    measure: str,
) -> list[str]:
    pairs = [(results[one, seed].scores, results[other, seed].scores) for seed in seeds]
    both = [(before, after) for before, after in pairs if before and after]
    return [
        difference([after[m][measure] - before[m][measure] for before, after in both if m in before and m in after])
        for m in maps
    ]


def _score_at(results: dict[tuple[str, int], Result], measure: str) -> Callable[[str, int, str], float]:
    """The score of a variant and a seed at a share of the cache."""
    return lambda name, seed, share: results[name, seed].scores[share][measure]


def _between_shares(
    study: dict[str, Any],
    seeds: dict[str, list[int]],
    shares: dict[str, str],
    value: Callable[[str, int, str], float],
    digits: int,
) -> list[list[str]]:
    """Rows for ``compare_shares``: both values, and their differences paired by seed."""
    rows = []
    for one, other in study.get("compare_shares", []):
        (before, share), (after, other_share) = one.split("@"), other.split("@")
        both = [seed for seed in seeds.get(before, []) if seed in seeds.get(after, [])]
        first = [value(before, seed, share) for seed in both]
        second = [value(after, seed, other_share) for seed in both]
        names = f"{after} at {shares[other_share]} minus {before} at {shares[share]}"
        apart = difference([b - a for a, b in zip(first, second)])
        rows.append([names, str(len(both)), spread(second, digits), spread(first, digits), apart])
    return rows


def difference(values: Sequence[float]) -> str:
    """Mean, standard error and 95 % interval of paired differences."""
    if not 1 < len(values) <= len(_T):
        return ""
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    reach = _T[len(values) - 1] * error
    mark = "**" if abs(mean) > 2 * error else ""
    return f"{mark}{mean:+.3f}{mark} (error {error:.3f}; {mean - reach:+.3f} to {mean + reach:+.3f})"


def page(file: Path, study: dict[str, Any], runs: Sequence[Run], train: str) -> str:
    """The results as Markdown; ``train`` is the module that the runs were started with.

    Raises:
        UserError: no run is finished yet.
    """
    done = [run for run in runs if run.record is not None]
    if not done:
        raise UserError(f"no run of {file} is finished yet")
    results = {(run.variant, run.seed): Result(run.folder) for run in done}
    first = next(iter(results.values()))
    shares = {f"{r:.2f}": f"{100 * r:g} %" for r in sorted(first.config["eval"]["retention"], reverse=True)}
    steps = sorted(set.intersection(*(set(one.losses) for one in results.values())))
    names = list(dict.fromkeys(run.variant for run in done))
    seeds = {name: [run.seed for run in done if run.variant == name] for name in names}

    def at(name: str, share: str, step: int | None = None) -> list[float]:
        """The losses of all seeds; after their last step where none is given."""
        return [
            (one.last if step is None else one.losses[step])[share] for one in (results[name, s] for s in seeds[name])
        ]

    began = sorted(run.record["began"] for run in done if run.record)
    text = f"# {study['title']}\n\nMade by `python -m skv_tools.study {os.path.relpath(file)}`; the first of its "
    text += f"{len(done)} runs (of {len(runs)} asked for) began at {began[0]}, the last at {began[-1]}.\n\n"
    for name in ("software", "processes", "model", "batch", "run"):
        text += f"- {name}: {'; '.join(sorted({one.said(name) for one in results.values()}))}\n"
    abouts = [Path(folder, "about.md") for folder in study.get("prepare", {})]
    text += "".join(about.read_text(encoding="utf-8") for about in abouts if about.exists()) + "\n"
    for section in ("reading", "prediction"):
        text += f"## {section.capitalize()}\n\n{study[section].strip()}\n\n" if study.get(section) else ""

    rows = [[name, str(len(seeds[name])), *(spread(at(name, share)) for share in shares)] for name in names]
    text += f"## Loss by share of the cache\n\n{_LOSSES}\n\n{table(['', 'seeds', *shares.values()], rows)}"

    rows = []
    for one, other in study.get("compare", []):
        both = [seed for seed in seeds.get(one, []) if seed in seeds.get(other, [])]
        pairs = [[results[pair].last for pair in ((one, seed), (other, seed))] for seed in both]
        cells = [difference([after[share] - before[share] for before, after in pairs]) for share in shares]
        rows.append([f"{other} minus {one}", str(len(both)), *cells])
    text += f"\n## Differences, paired by seed\n\n{_DIFFERENCES}\n\n{table(['', 'seeds', *shares.values()], rows)}"

    rows = _between_shares(study, seeds, shares, lambda name, seed, share: results[name, seed].last[share], 3)
    if rows:
        text += "\n## Differences between shares of the cache, paired by seed\n\n"
        text += table(["", "seeds", "first", "second", "difference"], rows)

    maps = list(dict.fromkeys(map_name for one in results.values() for map_name in one.scores))
    for measure, words in (("token_f1", "Token F1"), ("exact_match", "Exact match")) if maps else ():
        rows = [
            [
                name,
                str(len(seeds[name])),
                *(
                    spread([one[m][measure] for seed in seeds[name] if m in (one := results[name, seed].scores)], 1)
                    for m in maps
                ),
            ]
            for name in names
        ]
        text += f"\n## {words} by share of the cache\n\n{_SCORES}\n\n{table(['', 'seeds', *maps], rows)}"
        rows = [
            [f"{other} minus {one}", str(len(both)), *cells]
            for one, other in study.get("compare", [])
            if (both := [seed for seed in seeds.get(one, []) if seed in seeds.get(other, [])])
            and (cells := _score_differences(results, one, other, both, maps, measure))
        ]
        text += f"\n{table(['', 'seeds', *maps], rows)}" if rows else ""
        if all(share in one.scores for one in results.values() for share in shares):
            rows = _between_shares(study, seeds, shares, _score_at(results, measure), 1)
            text += f"\n{table(['', 'seeds', 'first', 'second', 'difference'], rows)}" if rows else ""

    rows = []
    for name in names:
        for layers in results[name, seeds[name][0]].maps:
            values = [results[name, seed].maps[layers] for seed in seeds[name]]
            rows.append([name, layers, str(len(values)), spread(values)])
    if rows:
        text += f"\n## With other layers cached\n\n{table(['', 'layers that keep a cache', 'seeds', 'loss'], rows)}"

    rows = []
    for (name, seed), one in results.items():
        rate = statistics.median(line["tokens_per_second"] for line in one.metrics if "tokens_per_second" in line)
        values = [f"{one.last[share]:.3f}" for share in shares]
        rows.append([name, str(seed), *values, str(one.metrics[-1]["skipped"]), f"{rate:,.0f}"])
    head = ["", "seed", *shares.values(), "updates skipped", "tokens/s beside other runs"]
    text += f"\n## Every seed\n\n{table(head, rows)}"

    share = next(iter(shares))
    rows = [[name, *(spread(at(name, share, step)) for step in steps)] for name in names]
    if steps:  # at which all runs were measured
        text += f"\n## Loss by step, at {shares[share]} of the cache\n\n{table(['', *map(str, steps)], rows)}"

    lines = [f"python -m {shlex.join(arguments)}" for arguments in study.get("prepare", {}).values()]
    lines += [f"python -m {train} {shlex.join(run.arguments)}" for run in done]
    return text + "\n## Commands\n\n```\n" + "\n".join(lines) + "\n```\n"
