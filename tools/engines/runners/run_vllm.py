"""Log-probs and cache size of an exported folder in vLLM; run with that engine's own Python.

    python run_vllm.py FOLDER TOKENS.npy OUT.npz [--stock] [--engine JSON]

TOKENS: int64 [n, s]. OUT: ``prefill`` and ``stepwise`` float32 [n, s, V], ``cache_bytes_per_token`` and
``cache_measured``, how it was, ``cache_tokens_per_gib`` and ``model``, the class that vLLM ran. ``--stock``: without
this project's plugin. ``--engine``: more arguments of ``vllm.LLM``, e.g. '{"hf_overrides": {"kv_retention": 0.5}}'.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# One process, so that what it holds can be looked at. Read by vLLM when it is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# On CPUs vLLM wants a NUMA node for each worker otherwise.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

_ALLOTTED_BYTES = 2**30


def _engine(folder: Path, length: int, stock: bool, settings: dict[str, Any]) -> Any:
    if stock:
        os.environ["VLLM_PLUGINS"] = ""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Forced(AdapterLogitsProcessor):
        """Samples the tokens listed in a request's ``extra_args["forced"]``, whatever the model says."""

        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(
            self, params: SamplingParams
        ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
            forced = (params.extra_args or {}).get("forced")
            if forced is None:
                return None

            def force(output: list[int], logits: torch.Tensor) -> torch.Tensor:
                if len(output) >= len(forced):
                    return logits
                only = torch.full_like(logits, float("-inf"))
                only[forced[len(output)]] = 0
                return only

            return force

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": length + 1,
        "kv_cache_memory_bytes": _ALLOTTED_BYTES,
        "max_num_seqs": 4,
        "max_logprobs": -1,  # the whole vocabulary
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "logits_processors": [Forced],
    }
    return LLM(str(folder), trust_remote_code=True, **defaults | settings)


def _log_probs(llm: Any, prompts: list[list[int]], forced: list[list[int]]) -> np.ndarray:
    """float32 [n, s, V] of tokens prompts[i] + forced[i]: the prompt at once, the others one by one."""
    from vllm import SamplingParams, TokensPrompt

    def sampling(continuation: list[int]) -> SamplingParams:
        wanted = {"logprobs": -1, "detokenize": False, "flat_logprobs": True}  # of raw logits, before `Forced`
        if not continuation:
            return SamplingParams(max_tokens=1, prompt_logprobs=-1, **wanted)
        return SamplingParams(max_tokens=len(continuation) + 1, extra_args={"forced": continuation}, **wanted)

    outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], [sampling(tokens) for tokens in forced])

    def row(position: dict[int, Any]) -> list[float]:
        return [position[token].logprob for token in range(len(position))]

    # vLLM has nothing before the first token, and of the last only what follows it
    return np.array(
        [
            [row(position) for position in [*list(result.prompt_logprobs or [])[1:], *result.outputs[0].logprobs]]
            for result in outputs
        ],
        np.float32,
    )


def _cache_bytes(worker: Any) -> int:
    """Bytes of the worker's K/V tensors; layers that share have the same one."""
    storages = [cache.untyped_storage() for cache in worker.model_runner.kv_caches]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _groups(worker: Any) -> int:
    return len(worker.model_runner.kv_cache_config.kv_cache_groups)


def _model(worker: Any) -> str:
    model = type(worker.get_model())
    return f"{model.__module__}.{model.__name__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON")
    arguments = parser.parse_args()
    tokens = np.load(arguments.tokens)
    rows = tokens.tolist()
    llm = _engine(arguments.folder, tokens.shape[1], arguments.stock, arguments.engine)
    cache = llm.llm_engine.vllm_config.cache_config
    # Layers of different kinds are in different groups, each of which takes blocks of its own for a token.
    positions = cache.num_gpu_blocks * cache.block_size // llm.collective_rpc(_groups)[0]
    cache_bytes = sum(llm.collective_rpc(_cache_bytes))
    np.savez(
        arguments.out,
        prefill=_log_probs(llm, rows, [[] for _ in rows]),
        stepwise=_log_probs(llm, [row[:1] for row in rows], [row[1:] for row in rows]),
        cache_bytes_per_token=cache_bytes / positions,
        cache_measured=f"bytes of the K/V tensors that vLLM allocated ({cache_bytes:,}), a position of its "
        f"{positions:,}",
        cache_tokens_per_gib=int(positions * 2**30 / cache_bytes),
        model=llm.collective_rpc(_model)[0],
    )


if __name__ == "__main__":
    main()
