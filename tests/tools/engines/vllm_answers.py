"""The likeliest answers of an exported folder in vLLM through our plugin; a process of its own, with vLLM's Python.

    python -m tests.tools.engines.vllm_answers FOLDER OUT.npz ENGINE_JSON

OUT: ``logs`` float32 [prompts, new tokens, V], log-probabilities, and ``rows`` int64 [forwards, layers], over how many
rows each layer ran.
"""

import json
import os
import sys
from typing import Any

import numpy as np

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that the model can be looked at
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
LENGTHS, NEW = (3, 24, 1, 11, 40), 6


def main(folder: str, out: str, given: str) -> None:
    from skv_tools.engines.models.vllm_plugin import register
    from vllm import LLM, SamplingParams, TokensPrompt

    register()
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 64,
        "kv_cache_memory_bytes": 2**28,
        "max_num_seqs": 4,  # one prompt waits for another's end
        "max_logprobs": -1,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }
    llm = LLM(folder, trust_remote_code=True, **settings | json.loads(given))
    rows: list[int] = []

    def watch(worker: Any) -> int:
        for layer in worker.get_model().model.layers:
            layer.mlp.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[0]))
        return len(worker.get_model().model.layers)

    (layers,) = llm.collective_rpc(watch)
    random = np.random.default_rng(0)
    prompts = [TokensPrompt(prompt_token_ids=random.integers(0, 97, length).tolist()) for length in LENGTHS]
    sampling = SamplingParams(max_tokens=NEW, temperature=0, logprobs=-1, detokenize=False, ignore_eos=True)
    answers = [answer.outputs[0].logprobs for answer in llm.generate(prompts, sampling, use_tqdm=False)]
    logs = [[[at[token].logprob for token in range(len(at))] for at in answer] for answer in answers]
    np.savez(out, logs=np.array(logs, np.float32), rows=np.array(rows).reshape(-1, layers))


if __name__ == "__main__":
    main(*sys.argv[1:])
