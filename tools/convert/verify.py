"""Whether an exported model is the checkpoint it came from, in the engine that serves it."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from skv_dist.checkpoint.folder import read_state
from skv_dist.checkpoint.frozen_model import config_of, frozen_model
from skv_dist.errors import UserError
from skv_dist.parallel.processes import groups
from skv_dist.routing import RoutePlan, map_from_retention

from ..engines import runners
from ..weights import DTYPES
from .hf_config import hf_config, shared_fields
from .hf_folder import read_json
from .names import shapes
from .to_hf import CODE, MODELS, Export, write_tensors

Array = npt.NDArray[np.float32]
Map = tuple[int, ...]

RUNNERS_FOLDER = Path(runners.__file__).parent
RUNNERS = {name: f"run_{name}.py" for name in ("transformers", "onnx", "mlx", "vllm")}
TOLERANCE = 1e-4  # largest difference of a log-probability, float32
TEXT = (
    "A language model keeps the keys and values of every token it has read, in every layer. When some layers read "
    "those of an earlier one, the memory that a long conversation takes shrinks by as much, and the answer should "
    "stay the same: 1 + 1 = 2, def f(x): return x, and so on, in any language (c'est la vie; Grüße)."
)


@dataclass(frozen=True)
class Finding:
    """What was measured under one map.

    Attributes:
        prefill, stepwise: largest difference of a log-probability from the checkpoint's, the text given at once, and
            token by token.
        wrong_map: the same difference from the checkpoint under another map: it must be large.
        cache_bytes, unshared_bytes: per token, measured in the engine; of a model that shares nothing.
        how: what was measured.
    """

    engine: str
    sources: Map
    prefill: float
    stepwise: float
    wrong_map: float
    cache_bytes: float
    unshared_bytes: float
    how: str

    @property
    def ratio(self) -> float:
        return self.cache_bytes / self.unshared_bytes

    @property
    def expected_ratio(self) -> float:
        return len(set(self.sources)) / len(self.sources)

    def problem(self) -> str | None:
        """Why this is a failure; None if it is none."""
        if not max(self.prefill, self.stepwise) <= TOLERANCE:
            return f"log-probabilities differ by {max(self.prefill, self.stepwise):.1e} (limit {TOLERANCE:g})"
        if not self.wrong_map > 10 * TOLERANCE:
            return f"the comparison does not tell maps apart (another map differs by {self.wrong_map:.1e} only)"
        if abs(self.ratio - self.expected_ratio) > 0.02:
            return f"the cache holds {self.ratio:.3f} of an unshared one instead of {self.expected_ratio:.3f}"
        return None


def table(findings: Sequence[Finding]) -> str:
    """The findings in Markdown."""
    rows = [
        "| engine | layers with a cache | max Δ log p, prefill | token by token | under a wrong map "
        "| cache bytes/token | unshared | ratio | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for f in findings:
        rows.append(
            f"| {f.engine} | {len(set(f.sources))} of {len(f.sources)} | {f.prefill:.1e} | {f.stepwise:.1e} | "
            f"{f.wrong_map:.1e} | {f.cache_bytes:,.0f} | {f.unshared_bytes:,.0f} | {f.ratio:.3f} | "
            f"{f.problem() or 'ok'} |"
        )
    return "\n".join(rows)


def verify(
    checkpoint: Path, exported: Path, engine: str, python: str = sys.executable, text: str = TEXT, most_tokens: int = 64
) -> list[Finding]:
    """Compare an exported folder with its checkpoint; one finding for each map that is tried.

    The checkpoint's weights are rounded to the exported type, and both sides compute in float32.

    Args:
        engine: one of `RUNNERS`.
        python: the interpreter that has the engine.
        most_tokens: the text is cut to so many tokens.

    Raises:
        UserError: a folder cannot be read, or the engine fails.
    """
    config = read_json(exported / "config.json")
    sources = _map_of(config)
    layers = len(sources)
    _check_code(exported, config)
    maps = [sources]
    if engine == "transformers" and len(config.get("kv_weight_layers") or ()) == layers:  # adaptive
        maps = list(dict.fromkeys([sources, *(map_from_retention(layers, r) for r in (1.0, 0.5, 0.25))]))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        tokens = _tokens(exported, text, most_tokens)
        wrong = {given: _another(given) for given in maps}
        reference = _reference(checkpoint, tokens, {*maps, *wrong.values()}, DTYPES[config["dtype"]])
        np.save(work / "tokens.npy", tokens)
        np.save(work / "few.npy", np.full((1, 16), 2, np.int64))
        _write_unshared(checkpoint, work / "unshared", config["dtype"])
        unshared = _run(engine, python, work / "unshared", work / "few.npy", work / "unshared.npz")
        findings = []
        for given in maps:
            chosen = [] if given == sources else ["--kv-source-layers", *map(str, given)]
            found = _run(engine, python, exported, work / "tokens.npy", work / "found.npz", *chosen)
            right, other = reference[given], reference[wrong[given]]
            findings.append(
                Finding(
                    engine,
                    given,
                    _apart(found["prefill"], right),
                    _apart(found["stepwise"], right),
                    _apart(found["prefill"], other),
                    float(found["cache_bytes_per_token"]),
                    float(unshared["cache_bytes_per_token"]),
                    str(found["cache_measured"]),
                )
            )
    return findings


def _apart(found: Array, expected: Array) -> float:
    return float(np.max(np.abs(found - expected)))


def _map_of(config: dict[str, Any]) -> Map:
    layers = int(config["num_hidden_layers"])
    owners = layers - int(config.get("num_kv_shared_layers", 0))  # Gemma 4's way to say it
    return tuple(config.get("kv_source_layers") or (min(layer, owners - 1) for layer in range(layers)))


def _another(sources: Map) -> Map:
    """A map that differs: nothing shared, or groups of two where that is the map."""
    own = tuple(range(len(sources)))
    return own if sources != own else map_from_retention(len(own), 0.5)


def _check_code(exported: Path, config: dict[str, object]) -> None:
    """What runs here is the installed code, so the folder must carry the same."""
    for name in CODE if config["model_type"] == "skv" else ():
        if not (exported / name).exists() or (exported / name).read_bytes() != (MODELS / name).read_bytes():
            raise UserError(f"{exported / name} is not the file of this version of skv-dist: export the folder again")


def _tokens(exported: Path, text: str, most: int) -> npt.NDArray[np.int64]:
    from transformers import AutoConfig, AutoTokenizer

    from ..engines.models.modeling_skv import SkvConfig

    AutoConfig.register(SkvConfig.model_type, SkvConfig, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:most]
    if len(ids) < 2:
        raise UserError("the text to compare on has fewer than two tokens")
    return np.asarray([ids], dtype=np.int64)


@torch.no_grad()
def _reference(checkpoint: Path, tokens: npt.NDArray[np.int64], maps: set[Map], dtype: torch.dtype) -> dict[Map, Array]:
    """Log-probabilities [1, s, V] of the checkpoint under each map, in float32."""
    length = tokens.shape[1]
    run = config_of(checkpoint, [f"data.sequence_length={length}", "train.precision=fp32"])
    vocab_size = int(read_state(checkpoint)["vocab_size"])
    world = groups.start(run.parallel)
    engine = frozen_model(run, checkpoint, world)
    for parameter in engine.root.parameters():
        parameter.copy_(parameter.to(dtype))
    engine.root.eval()
    found = {}
    for sources in maps:
        logits = engine.forward(0, RoutePlan(sources), torch.from_numpy(tokens).to(world.device))
        found[sources] = torch.log_softmax(logits[..., :vocab_size].float(), -1).cpu().numpy()
    engine.close()
    groups.stop()
    return found


def _write_unshared(checkpoint: Path, out: Path, dtype: str) -> None:
    """A model whose cache has the same shape and in which no layer shares; all else is as small as can be."""
    model = config_of(checkpoint).model
    changes = {"hidden_size": 8, "ffn_hidden_size": 8, "tie_embeddings": True, "block": "llama"}
    small = model.model_copy(update={**changes, "head_dim": model.kv_channels})
    own = tuple(range(model.num_layers))
    out.mkdir()
    special: dict[str, int | None] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    fields = {**hf_config(small, 8, dtype, special), **shared_fields(small, own, list(own))}
    (out / "config.json").write_text(json.dumps(fields))
    for name in CODE:
        (out / name).write_bytes((MODELS / name).read_bytes())
    export = replace(Export(own), dtype=dtype)
    write_tensors(out, small, 8, None, export, dtype, lambda entry: [torch.ones(s) for s in shapes(entry, small, 8)])


def _run(engine: str, python: str, folder: Path, tokens: Path, out: Path, *more: str) -> dict[str, Array]:
    """The arrays that the engine's runner writes."""
    command = [python, str(RUNNERS_FOLDER / RUNNERS[engine]), str(folder), str(tokens), str(out), *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"--python {python} cannot be run: {error.strerror}") from error
    if done.returncode:
        raise UserError(f"{engine} cannot run {folder}: {last_error(done.stderr)}")
    with np.load(out) as arrays:
        return dict(arrays)


def last_error(printed: str) -> str:
    """The last line that names an error; vLLM's progress bars come after it."""
    lines = printed.strip().splitlines() or ["it failed and said nothing"]
    return next((line for line in reversed(lines) if "Error: " in line), lines[-1])
