"""Whether an exported model is the checkpoint it came from, in the engine that serves it."""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skv_dist.checkpoint.frozen_model import config_of
from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError
from skv_dist.routing import map_from_order, map_from_retention

from ..engines.export.exported_config import read_config
from ..engines.export.onnx_genai import bits_of, float32, map_weights, rounded
from ..weights import DTYPES
from .blocks import Map
from .findings import FLOAT64_LIMIT, Finding, float16_limit, float32_limit
from .hf_config import CODE, CODE_FIELDS, OUR_MODEL_TYPE, map_of, shape_of
from .hf_folder import read_json
from .kinds import refuse_other_kinds
from .layerwise import LogProbs, checkpoint_log_probs
from .reference import TEXT, Tokens, comparison_tokens, write_unshared
from .run_engine import Arrays, run_engine
from .to_hf import MODELS


def verify(
    checkpoint: Path,
    exported: Path,
    engine: str,
    python: str = sys.executable,
    text: str = TEXT,
    max_tokens: int = 64,
    asked: Map | None = None,
) -> list[Finding]:
    """Compare an exported folder with its checkpoint; one finding for each map that is tried.

    The checkpoint's weights are rounded to the exported type, and it computes in float64. So does transformers; of the
    other engines, which compute in float32, it is known what that rounds away. This process holds one layer and the
    embedding in float64, the engine's the folder, and one weight in float64 or what the engine takes.

    Args:
        engine: one of `run_engine.ENGINES`.
        python: the interpreter that has the engine.
        max_tokens: the text is cut to so many tokens.
        asked: the map that the folder was to have; None: the one that it says it has.

    Raises:
        UserError: a folder cannot be read, or the engine fails.
    """
    config = _exported_config(exported)
    layers = config_of(checkpoint).model.num_layers
    if config["num_hidden_layers"] != layers:
        raise UserError(
            f"{exported / 'config.json'}: num_hidden_layers is {config['num_hidden_layers']}, but {checkpoint} has "
            f"{layers} layers: it was made from another checkpoint"
        )
    own, maps = map_of(config), _maps_to_try(config, engine)
    if asked is not None:
        maps = list(dict.fromkeys([asked, *(sources for sources in maps if sources != own)]))
    wrong_map = {sources: _another(sources) for sources in maps}
    tokens = comparison_tokens(exported, text, max_tokens)
    cases = [(sources, torch.float64) for sources in dict.fromkeys([*maps, *wrong_map.values()])]
    if engine != "transformers":
        cases += [(sources, torch.float32) for sources in maps]
    expected = checkpoint_log_probs(checkpoint, tokens, cases, DTYPES[config["dtype"]])

    def limit(sources: Map) -> float:
        if engine == "transformers":
            return FLOAT64_LIMIT
        noise = largest_difference(expected[sources, torch.float32], expected[sources, torch.float64])
        return float32_limit(noise)

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        np.save(work / "tokens.npy", tokens)
        unshared = _unshared_bytes(config_of(checkpoint).model, work, engine, python, config["dtype"])
        findings = []
        for sources in maps:
            options = [] if sources in (own, asked) else ["--kv-source-layers", *map(str, sources)]
            measured = run_engine(engine, python, exported, work / "tokens.npy", work / "measured.npz", *options)
            right, other = expected[sources, torch.float64], wrong_map[sources]
            wrong = None if other == sources else expected[other, torch.float64]  # a model of one layer has no other
            findings.append(_finding(engine, sources, measured, right, wrong, limit(sources), unshared))
    return findings


def verify_onnx(exported: Path, onnx: Path, python: str = sys.executable, dtype: str = "float32") -> list[Finding]:
    """Compare what `export_onnx` wrote, in ONNX Runtime, with the exported folder that it was made from.

    The folder runs in transformers, in float64; what is known to be rounded away is measured there too, in float32 or,
    for a folder of float16, in float16. One of int4 is compared with the same model whose weights are rounded: what
    that costs is another question. Memory: that of the larger of both, one after the other; ONNX Runtime holds all
    weights in float32.

    Args:
        dtype: of ``onnx``; one of `DTYPES` of the export.

    Raises:
        UserError: a folder cannot be read, or an engine fails.
    """
    config = _exported_config(exported)
    sources = map_of(config)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        np.save(work / "tokens.npy", comparison_tokens(exported, TEXT, 64))
        compared = exported
        if dtype == "int4":
            compared = work / "rounded"
            _write_rounded(exported, compared)

        def run(*options: str) -> Any:
            files = work / "tokens.npy", work / "expected.npz"
            return run_engine("transformers", sys.executable, compared, *files, *options)

        right, narrow = run()["prefill"], run("--dtype", "float16" if dtype == "float16" else "float32")
        other = another_of_folder(sources)
        wrong = None if other is None else run("--kv-source-layers", *map(str, other))["prefill"]
        unshared = _unshared_bytes(shape_of(config), work, "onnx", python, "float32", "--dtype", dtype)
        measured = run_engine("onnx", python, onnx, work / "tokens.npy", work / "measured.npz")
    noise = max(largest_difference(narrow[way], right) for way in ("prefill", "stepwise"))
    limit = (float16_limit if dtype == "float16" else float32_limit)(noise)
    return [_finding("onnx", sources, measured, right, wrong, limit, unshared)]


def _write_rounded(exported: Path, out: Path) -> None:
    """The folder with its weights as one of int4 keeps them, and all of it in float32."""
    from safetensors.numpy import save_file

    out.mkdir()
    for path in exported.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != "model.safetensors.index.json":
            shutil.copy(path, out)
    config = read_json(exported / "config.json")
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    weights = {name: float32(tensor) for name, tensor in map_weights(exported).items()}
    bits = {name: bits_of(name) for name in weights}
    kept = {name: tensor if bits[name] == 32 else rounded(tensor, bits[name]) for name, tensor in weights.items()}
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in kept.items()}, out / "model.safetensors")


def verify_start(source: Path, checkpoint: Path, tokens: Tokens) -> list[Finding]:
    """Compare a checkpoint with the Hugging Face folder that it was made from, which runs in transformers.

    Raises:
        UserError: a folder cannot be read, or transformers fails.
    """
    config = read_json(source / "config.json")
    full = tuple(range(config["num_hidden_layers"]))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        np.save(work / "tokens.npy", tokens)
        measured = run_engine("transformers", sys.executable, source, work / "tokens.npy", work / "measured.npz")
    other = _another(full)
    stored = DTYPES[str(measured["stored"])]
    cases = [(full, torch.float64), (other, torch.float64)]
    expected = checkpoint_log_probs(checkpoint, tokens, dict.fromkeys(cases), stored)
    right, wrong = (expected[case] for case in cases)
    held = float(measured["cache_bytes_per_token"])
    return [_finding("transformers", full, measured, right, wrong if other != full else None, FLOAT64_LIMIT, held)]


def _finding(
    engine: str,
    sources: Map,
    measured: Arrays,
    right: LogProbs,
    wrong: LogProbs | None,
    limit: float,
    unshared_bytes: float,
) -> Finding:
    return Finding(
        engine,
        sources,
        prefill=largest_difference(measured["prefill"], right),
        stepwise=largest_difference(measured["stepwise"], right),
        limit=limit,
        wrong_map=None if wrong is None else largest_difference(measured["prefill"], wrong),
        cache_bytes=float(measured["cache_bytes_per_token"]),
        unshared_bytes=unshared_bytes,
        how=str(measured["cache_measured"]),
    )


def _unshared_bytes(model: ModelConfig, work: Path, engine: str, python: str, dtype: str, *options: str) -> float:
    """Bytes of cache a token that the engine holds for a model of this shape in which no layer shares."""
    np.save(work / "few.npy", np.full((1, 16), 2, np.int64))
    write_unshared(model, work / "unshared", dtype)
    measured = run_engine(engine, python, work / "unshared", work / "few.npy", work / "unshared.npz", *options)
    return float(measured["cache_bytes_per_token"])


def largest_difference(one: LogProbs, other: LogProbs) -> float:
    """Infinite where the shapes differ: another vocabulary, say."""
    if one.shape != other.shape:
        return float("inf")
    return float(np.max(np.abs(one - other)))


def _exported_config(exported: Path) -> dict[str, Any]:
    """``config.json`` of an exported folder that names no code but ours.

    Raises:
        UserError: naming file and field.
    """
    refuse_other_kinds(exported)
    _check_code(exported, read_json(exported / "config.json"))
    try:
        return read_config(exported)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_code(exported: Path, config: dict[str, Any]) -> None:
    """Nothing but the installed code runs here: the folder must carry the same, and name no other.

    vLLM and MLX run what the fields of `CODE_FIELDS` name, files of the folder or of the hub.

    Raises:
        UserError: naming the file, and the field.
    """
    is_ours = config.get("model_type") == OUR_MODEL_TYPE
    for file in sorted(exported.glob("*config.json")):
        fields = read_json(file)
        for field, ours in CODE_FIELDS.items():
            if field in fields and not (is_ours and file.name == "config.json" and fields[field] == ours):
                raise UserError(
                    f"{file}: {field} names code that is not this version's, which an engine might run: export the "
                    "folder again, or do not use it"
                )
    for name in CODE if is_ours else ():
        if not (exported / name).exists() or (exported / name).read_bytes() != (MODELS / name).read_bytes():
            raise UserError(f"{exported / name} is not the file of this version of skv-dist: export the folder again")


def _maps_to_try(config: dict[str, Any], engine: str) -> list[Map]:
    """The folder's own, and of an adaptive folder a few more, where the runner can be told."""
    sources, layers = map_of(config), config["num_hidden_layers"]
    is_adaptive = len(config.get("kv_weight_layers") or ()) == layers
    if engine != "transformers" or not is_adaptive:
        return [sources]
    order = config.get("kv_order")
    few = [map_from_retention(layers, r) if order is None else map_from_order(order, r) for r in (1.0, 0.5, 0.25)]
    return list(dict.fromkeys([sources, *few]))


def another_of_folder(sources: Map) -> Map | None:
    """A map of the same owners, which a folder without further K/V weights can run; None where there is no other."""
    owners = sorted(set(sources))
    for layer in reversed(range(len(sources))):
        others = [owner for owner in owners if owner < layer and owner != sources[layer]]
        if sources[layer] != layer and others:
            return (*sources[:layer], others[0], *sources[layer + 1 :])
    return None


def _another(sources: Map) -> Map:
    """A map that differs: nothing shared, or groups of two where that is the map."""
    unshared = tuple(range(len(sources)))
    return unshared if sources != unshared else map_from_retention(len(unshared), 0.5)
