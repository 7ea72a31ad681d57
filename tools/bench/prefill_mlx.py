"""Time to first token in mlx-lm where the last layers all borrow; run with that engine's own Python.

    mlx/bin/python -m tools.bench.prefill_mlx --contexts 256 512                       # in a checkout

The exported model (`mlx_skv.py`) with random float32 weights, in `mlx_lm.generate.generate_step`. It feeds a prompt in
chunks and evaluates the cache behind each. MLX computes what is evaluated and nothing else, so layers that add nothing
to the cache are not run over the prompt. "Whole rows" evaluates the logits of each chunk too. Columns are those of
`bench.prefill`, whose shape `small` this is.
"""

import argparse
import platform
import time
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step

from ..engines.models.mlx_skv import Model, ModelArgs
from .paired_row import SHARES, paired_row

LAYERS, VOCABULARY = 16, 4096
HEADER = (
    "| context | layers that trail | no sharing, ms | whole rows, ms | as it is, ms | saved by skipping | bound |\n"
    "|---|---|---|---|---|---|---|"
)


def build(trailing: int) -> Model:
    """Random weights; the last ``trailing`` layers borrow from the one before them."""
    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="skv",
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            max_position_embeddings=40960,
            tie_word_embeddings=True,
            qk_norm=True,
            kv_source_layers=[min(layer, LAYERS - trailing - 1) for layer in range(LAYERS)],
        )
    )
    mx.eval(model.parameters())
    return model


class WholeRows:
    """A model whose logits are computed, whether or not they are read."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.layers, self.make_cache = model.layers, model.make_cache

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        logits = self._model(*args, **kwargs)
        mx.eval(logits)
        return logits


def seconds(model: Any, tokens: mx.array) -> float:
    began = time.perf_counter()
    next(iter(generate_step(tokens, model, max_tokens=1)))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, {platform.machine()}, CPU, {arguments.turns} turns\n")
    print(HEADER, flush=True)
    plain = build(0)
    for share in SHARES:
        trailing = round(share * LAYERS)
        model = build(trailing)
        cells = {"plain": plain, "whole": WholeRows(model), "skipping": model}
        for context in arguments.contexts:
            tokens = mx.random.randint(0, VOCABULARY, (context,))
            timed = {name: partial(seconds, of, tokens) for name, of in cells.items()}
            print(paired_row(context, trailing, LAYERS, timed, arguments.turns), flush=True)


if __name__ == "__main__":
    main()
