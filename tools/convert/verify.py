"""Whether an exported model is the checkpoint it came from, in the engine that serves it."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from skv_dist.errors import UserError
from skv_dist.routing import map_from_retention

from ..weights import DTYPES
from .blocks import Map
from .findings import Finding
from .hf_config import CODE, OUR_MODEL_TYPE, map_of
from .hf_folder import read_json
from .reference import TEXT, LogProbs, comparison_tokens, reference_log_probs, write_unshared
from .run_engine import run_engine
from .to_hf import MODELS


def verify(
    checkpoint: Path, exported: Path, engine: str, python: str = sys.executable, text: str = TEXT, max_tokens: int = 64
) -> list[Finding]:
    """Compare an exported folder with its checkpoint; one finding for each map that is tried.

    The checkpoint's weights are rounded to the exported type, and both sides compute in float32.

    Args:
        engine: one of `run_engine.ENGINES`.
        python: the interpreter that has the engine.
        max_tokens: the text is cut to so many tokens.

    Raises:
        UserError: a folder cannot be read, or the engine fails.
    """
    config = read_json(exported / "config.json")
    _check_code(exported, config)
    maps = _maps_to_try(config, engine)
    wrong_map = {sources: _another(sources) for sources in maps}
    tokens = comparison_tokens(exported, text, max_tokens)
    expected = reference_log_probs(checkpoint, tokens, {*maps, *wrong_map.values()}, DTYPES[config["dtype"]])
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        np.save(work / "tokens.npy", tokens)
        np.save(work / "few.npy", np.full((1, 16), 2, np.int64))
        write_unshared(checkpoint, work / "unshared", config["dtype"])
        unshared = run_engine(engine, python, work / "unshared", work / "few.npy", work / "unshared.npz")
        findings = []
        for sources in maps:
            options = [] if sources == map_of(config) else ["--kv-source-layers", *map(str, sources)]
            measured = run_engine(engine, python, exported, work / "tokens.npy", work / "measured.npz", *options)
            findings.append(
                Finding(
                    engine,
                    sources,
                    prefill=largest_difference(measured["prefill"], expected[sources]),
                    stepwise=largest_difference(measured["stepwise"], expected[sources]),
                    wrong_map=largest_difference(measured["prefill"], expected[wrong_map[sources]]),
                    cache_bytes=float(measured["cache_bytes_per_token"]),
                    unshared_bytes=float(unshared["cache_bytes_per_token"]),
                    how=str(measured["cache_measured"]),
                )
            )
    return findings


def largest_difference(one: LogProbs, other: LogProbs) -> float:
    return float(np.max(np.abs(one - other)))


def _check_code(exported: Path, config: dict[str, Any]) -> None:
    """What runs here is the installed code, so the folder must carry the same."""
    for name in CODE if config["model_type"] == OUR_MODEL_TYPE else ():
        if not (exported / name).exists() or (exported / name).read_bytes() != (MODELS / name).read_bytes():
            raise UserError(f"{exported / name} is not the file of this version of skv-dist: export the folder again")


def _maps_to_try(config: dict[str, Any], engine: str) -> list[Map]:
    """The folder's own, and of an adaptive folder a few more, where the runner can be told."""
    sources, layers = map_of(config), int(config["num_hidden_layers"])
    is_adaptive = len(config.get("kv_weight_layers") or ()) == layers
    if engine != "transformers" or not is_adaptive:
        return [sources]
    return list(dict.fromkeys([sources, *(map_from_retention(layers, retention) for retention in (1.0, 0.5, 0.25))]))


def _another(sources: Map) -> Map:
    """A map that differs: nothing shared, or groups of two where that is the map."""
    unshared = tuple(range(len(sources)))
    return unshared if sources != unshared else map_from_retention(len(unshared), 0.5)
