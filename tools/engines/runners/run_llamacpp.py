"""Log-probs and cache size of a GGUF file in llama.cpp; run with a Python that has llama-cpp-python (run with 0.3.36).

    python to_gguf.py LLAMA_CPP FOLDER MODEL.gguf
    python run_llamacpp.py MODEL.gguf TOKENS.npy OUT.npz

TOKENS: int64 [n, s]. OUT: ``prefill`` and ``stepwise`` float32 [n, s, V], ``cache_bytes_per_token`` and
``cache_measured``, how it was. K/V are held in float32. Only models of Gemma 4's block share K/V in llama.cpp.
"""

import argparse
import ctypes
import re
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np

_POSITIONS = 8192  # so that sizes, which are printed in MiB, are exact enough


class _Log:
    """What llama.cpp prints, where it says how large its cache is."""

    def __init__(self) -> None:
        self.text = ""
        self.callback = llama.llama_log_callback(self._add)
        llama.llama_log_set(self.callback, ctypes.c_void_p(0))

    def _add(self, level: int, text: bytes, data: Any) -> None:
        self.text += text.decode(errors="replace")

    def error(self) -> str:
        """The line that says why something failed, not the last one, which says that it did."""
        lines = self.text.strip().splitlines()
        return next((line for line in lines if "error" in line), lines[-1])

    def cache_bytes(self) -> float:
        """Of the caches with cells; one is made for sliding layers as well, which there may be none of."""
        sizes = re.findall(r"KV buffer size = +([\d.]+) MiB", self.text)
        return sum(map(float, sizes)) * 2**20


def _context(model: Any) -> Any:
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = _POSITIONS
    parameters.n_ubatch = 512
    parameters.type_k = parameters.type_v = llama.GGML_TYPE_F32
    parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return llama.llama_init_from_model(model, parameters)


def _feed(model: Any, tokens: np.ndarray, size: int) -> np.ndarray:
    """Log-probs [s, V] of tokens [s], fed ``size`` at a time."""
    context, vocabulary = _context(model), llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(size, 0, 1)
    rows = []
    for start in range(0, len(tokens), size):
        piece = tokens[start : start + size]
        batch.n_tokens = len(piece)
        for place, token in enumerate(piece):
            batch.token[place], batch.pos[place], batch.logits[place] = int(token), start + place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if llama.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        values = llama.llama_get_logits(context)
        rows.append(np.ctypeslib.as_array(values, shape=(len(piece) * vocabulary,)).reshape(-1, vocabulary).copy())
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    logits = np.concatenate(rows).astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    log = _Log()
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(arguments.model).encode(), llama.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {arguments.model}: {log.error()}")
    tokens = np.load(arguments.tokens)
    log.text = ""
    llama.llama_free(_context(model))
    cache_bytes = log.cache_bytes()
    np.savez(
        arguments.out,
        prefill=np.stack([_feed(model, row, len(row)) for row in tokens]),
        stepwise=np.stack([_feed(model, row, 1) for row in tokens]),
        cache_bytes_per_token=cache_bytes / _POSITIONS,
        cache_measured=f"KV buffer size that llama.cpp prints ({cache_bytes / 2**20:.2f} MiB), a position of "
        f"{_POSITIONS:,}",
    )


if __name__ == "__main__":
    main()
