"""Log-probs and cache size of an exported folder in mlx-lm; run with that engine's own Python.

    python run_mlx.py FOLDER TOKENS.npy OUT.npz [--config JSON]

TOKENS: int64 [n, s]. OUT: ``prefill`` and ``stepwise`` float32 [n, s, V], ``cache_bytes_per_token`` and
``cache_measured``, how it was. ``--config`` goes over ``config.json``, e.g. '{"kv_retention": 0.5}'.
"""

import argparse
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=json.loads, default={}, metavar="JSON")
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    # `mlx_lm.load` is this and the tokenizer, which is not needed
    model, _ = load_model(arguments.folder, trust_remote_code=True, model_config=arguments.config)
    tokens = mx.array(np.load(arguments.tokens).astype(np.int32))

    def log_probs(ids: mx.array, cache: list | None) -> np.ndarray:
        """ids [n, s] -> float32 [n, s, V]"""
        logits = model(ids, cache=cache).astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    cache = make_prompt_cache(model)
    prefill = log_probs(tokens, cache)
    # A reserved position, not a token: mlx-lm reserves them in steps that differ between its classes of caches.
    cache_bytes = sum((e.keys.nbytes + e.values.nbytes) / (e.keys.shape[2] * tokens.shape[0]) for e in cache)
    cache = make_prompt_cache(model)
    stepwise = np.concatenate([log_probs(tokens[:, i : i + 1], cache) for i in range(tokens.shape[1])], axis=1)
    np.savez(
        arguments.out,
        prefill=prefill,
        stepwise=stepwise,
        cache_bytes_per_token=cache_bytes,
        cache_measured=f"bytes of the arrays in the {len(cache)} caches that the model makes, a reserved position",
    )


if __name__ == "__main__":
    main()
