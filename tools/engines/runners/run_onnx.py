"""Log-probs and cache size of an exported folder in ONNX Runtime GenAI; run with that engine's own Python.

    python run_onnx.py FOLDER TOKENS.npy OUT.npz [--dtype TYPE] [--long N]

FOLDER is an exported folder (converted beside OUT first, to the type given) or one that `onnx_genai.export_onnx` wrote.
TOKENS: int64 [n, s]. OUT: ``prefill`` and ``stepwise`` float32 [n, s, V], ``cache_bytes_per_token`` and
``cache_measured``, how it was. With ``--long`` also ``long_rss_bytes``: by how much the process grew for a generator
of N tokens.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

# By path: the engine's own Python need not have skv-dist.
sys.path.insert(0, str(Path(__file__).parents[1]))
from export.onnx_genai import DTYPES, export_onnx


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """[..., V] -> float32 of the same shape."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)


def _generator(model: Any, length: int) -> Any:
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=length, do_sample=False)
    return og.Generator(model, options)


def _feed(model: Any, tokens: np.ndarray, size: int) -> np.ndarray:
    """Log-probs [s, V] of tokens [s], fed ``size`` at a time."""
    generator = _generator(model, len(tokens) + 1)
    parts = []
    for start in range(0, len(tokens), size):
        generator.append_tokens(tokens[None, start : start + size].astype(np.int32))
        parts.append(np.array(generator.get_output("logits"))[0])
    return _log_softmax(np.concatenate(parts))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _long(model: Any, length: int) -> int:
    """Bytes by which the process grew; the caches are allocated whole at the start, and zeroed, so resident."""
    before = _resident()
    generator = _generator(model, length)
    generator.append_tokens(np.ones((1, 8), np.int32))
    grown = _resident() - before
    del generator
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--long", type=int, metavar="N")
    arguments = parser.parse_args()
    tokens = np.load(arguments.tokens)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as scratch:
        folder = arguments.folder
        if not (folder / "genai_config.json").exists():
            folder = Path(scratch, "onnx")
            folder.mkdir()
            export_onnx(arguments.folder, folder, arguments.dtype)
        model = og.Model(str(folder))
        results: dict[str, Any] = {
            "prefill": np.stack([_feed(model, row, len(row)) for row in tokens]),
            "stepwise": np.stack([_feed(model, row, 1) for row in tokens]),
        }
        generator = _generator(model, tokens.shape[1] + 1)
        generator.append_tokens(tokens[:1].astype(np.int32))
        layers = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["num_hidden_layers"]
        caches = [
            np.array(generator.get_output(f"present.{layer}.{part}"))
            for layer in range(layers)
            for part in ("key", "value")
        ]
        results["cache_bytes_per_token"] = sum(cache.nbytes / cache.shape[2] for cache in caches)
        results["cache_measured"] = f"bytes of the {len(caches)} present.* tensors that the generator holds, a position"
        del generator
        if arguments.long:
            results["long_rss_bytes"] = _long(model, arguments.long)
        np.savez(arguments.out, **results)


if __name__ == "__main__":
    main()
