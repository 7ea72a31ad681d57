"""Log-probs and cache size of an exported folder in transformers; run with that engine's own Python.

    python run_transformers.py FOLDER TOKENS.npy OUT.npz [--kv-source-layers L ...]

TOKENS: int64 [n, s]. OUT: ``prefill`` and ``stepwise`` float32 [n, s, V], computed in float32;
``cache_bytes_per_token``, held in the folder's own type, and ``cache_measured``, how it was. Shared models run the
``modeling_skv.py`` of ``../models``, so that nothing in FOLDER is executed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

# By path: the engine's own Python need not have skv-dist.
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import modeling_skv


def _cache_bytes(cache: DynamicCache) -> int:
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kv-source-layers", type=int, nargs="+", help="map of an adaptive folder")
    arguments = parser.parse_args()
    AutoConfig.register("skv", modeling_skv.SkvConfig)
    AutoModelForCausalLM.register(modeling_skv.SkvConfig, modeling_skv.SkvForCausalLM)
    settings: dict[str, Any] = {"trust_remote_code": False, "dtype": torch.float32}
    if arguments.kv_source_layers is not None:
        settings["kv_source_layers"] = arguments.kv_source_layers
    tokens = torch.from_numpy(np.load(arguments.tokens))
    stored = getattr(torch, json.loads((arguments.folder / "config.json").read_text())["dtype"])
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, **settings)
    model.eval()
    with torch.inference_mode():
        prefill = torch.log_softmax(model(tokens).logits, -1)
        cache = DynamicCache(config=model.config)
        steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(tokens.shape[1])]
        stepwise = torch.log_softmax(torch.cat(steps, 1), -1)
        model.to(stored)
        cache = DynamicCache(config=model.config)
        model(tokens[:1], past_key_values=cache)
    np.savez(
        arguments.out,
        prefill=prefill.numpy(),
        stepwise=stepwise.numpy(),
        cache_bytes_per_token=_cache_bytes(cache) / tokens.shape[1],
        cache_measured=f"bytes of the storages that a DynamicCache in {stored} holds, a token",
    )


if __name__ == "__main__":
    main()
