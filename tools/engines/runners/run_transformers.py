"""Log-probs and cache size of an exported folder in transformers; run with that engine's own Python.

    python run_transformers.py FOLDER TOKENS.npy OUT.npz [--kv-source-layers L ...] [--dtype float32|float16]

TOKENS: int64 [n, s]. OUT: ``prefill`` and ``stepwise`` float64 [n, s, V], computed in float64 or in what ``--dtype``
says; ``cache_bytes_per_token``, held in the folder's own type, and ``cache_measured``, how it was; ``stored``,
that type. Shared models run ``modeling_skv.py`` of ``../models``, so that nothing in FOLDER is executed.

The model is in memory as FOLDER holds it, and one weight after the other is widened as it is used. Of ``stepwise`` the
last 16 tokens are given one by one, those before them at once: each step widens all weights anew.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

# By path: the engine's own Python need not have skv-dist.
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import modeling_skv

_STEPS = 16  # tokens given one by one


def _cache_bytes(cache: DynamicCache) -> int:
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def compute_in(model: torch.nn.Module, dtype: torch.dtype) -> list[Any]:
    """Let ``model`` compute in ``dtype`` with weights that stay as they are; what takes that back, by ``remove()``.

    A module's own weights are widened while it runs. An embedding, which may be the largest, widens what it looked up.
    """
    narrow: dict[torch.nn.Module, dict[str, Any]] = {}

    def widen(module: torch.nn.Module, _: Any) -> None:
        narrow[module] = dict(module._parameters)
        for name, weight in narrow[module].items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(weight.to(dtype), requires_grad=False)

    def put_back(module: torch.nn.Module, *_: Any) -> None:
        module._parameters.update(narrow.pop(module))

    handles: list[Any] = []
    for module in model.modules():
        if type(module) is torch.nn.Embedding:
            handles.append(module.register_forward_hook(lambda _, __, found: found.to(dtype)))
        elif any(weight is not None for weight in module._parameters.values()):
            handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(put_back)]
    return handles


class StayWide(TorchFunctionMode):
    """Leaves out whatever narrows float64 to float32: norms and softmax of transformers compute in that on purpose."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype is torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def log_probs(model: Any, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """``prefill`` and ``stepwise`` of ``tokens`` [n, s], each float64 [n, s, V]."""
    prefill = model(tokens).logits
    cache = DynamicCache(config=model.config)
    first = max(1, tokens.shape[1] - _STEPS)
    parts = [tokens[:, :first], *tokens[:, first:].split(1, dim=1)]
    stepwise = torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
    results = {"prefill": prefill, "stepwise": stepwise}
    return {name: torch.log_softmax(logits.double(), -1).numpy() for name, logits in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kv-source-layers", type=int, nargs="+", help="map of an adaptive folder")
    parser.add_argument("--dtype", choices=("float16", "float32", "float64"), default="float64", help="computed in")
    arguments = parser.parse_args()
    AutoConfig.register("skv", modeling_skv.SkvConfig)
    AutoModelForCausalLM.register(modeling_skv.SkvConfig, modeling_skv.SkvForCausalLM)
    tokens = torch.from_numpy(np.load(arguments.tokens))
    settings: dict[str, Any] = {"trust_remote_code": False, "dtype": "auto"}  # as the folder says
    if arguments.kv_source_layers is not None:
        settings["kv_source_layers"] = arguments.kv_source_layers
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, **settings)
    model.eval()
    stored = model.lm_head.weight.dtype
    with torch.inference_mode(), StayWide():
        handles = compute_in(model, getattr(torch, arguments.dtype))
        results: dict[str, Any] = dict(log_probs(model, tokens))
        for handle in handles:
            handle.remove()
        cache = DynamicCache(config=model.config)
        model(tokens[:1], past_key_values=cache)
    np.savez(
        arguments.out,
        **results,
        stored=str(stored).removeprefix("torch."),
        cache_bytes_per_token=_cache_bytes(cache) / tokens.shape[1],
        cache_measured=f"bytes of the storages that a DynamicCache in {stored} holds, a token",
    )


if __name__ == "__main__":
    main()
