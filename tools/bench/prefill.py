"""Time to first token of an exported model whose last layers all borrow: they run over the last position alone.

    python -m skv_tools.bench.prefill --out prefill.md                      # Qwen3-8B's shape, 8K and 32K, on a GPU
    python -m skv_tools.bench.prefill --shape small --contexts 2048 --out prefill.md        # on a CPU

The model is the exported one (`modeling_skv.py`) in transformers with random weights: bf16 on a GPU, float32 on a CPU.
For maps in which the last quarter, half and three quarters of the layers borrow: the prefill into an empty DynamicCache
and its argmax, with skipping, without it, and with no layer sharing at all. The three take turns; what is shown is the
median of the turns, and by how much less the first takes than the second, pair by pair. Bound: the share of layers that
borrow.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from skv_dist.commands.entry_point import entry_point
from skv_dist.config.model import ModelConfig
from skv_dist.versions import package_versions

from ..engines.models.modeling_skv import SkvConfig, SkvForCausalLM
from ..vocabulary import vocab_size
from .machine import heading, synchronize
from .shapes import SHAPES, read_shape

SHARES = (0.25, 0.5, 0.75)
HEADER = (
    "| context | layers that trail | no sharing, ms | whole rows, ms | skipping, ms | saved by skipping | bound |\n"
    "|---|---|---|---|---|---|---|"
)


def build(shape: ModelConfig, trailing: int, device: torch.device) -> Any:
    """Random weights; the last ``trailing`` layers borrow from the one before them."""
    owners = shape.num_layers - trailing
    config = SkvConfig(
        vocab_size=vocab_size(shape),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.kv_channels,
        rms_norm_eps=shape.norm_eps,
        max_position_embeddings=65536,
        tie_word_embeddings=shape.tie_embeddings,
        qk_norm=shape.qk_norm,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        kv_source_layers=[min(layer, owners - 1) for layer in range(shape.num_layers)],
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            return SkvForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def prefill(model: Any, tokens: torch.Tensor, skips: bool) -> float:
    """Seconds."""
    synchronize(tokens.device)
    began = time.perf_counter()
    cache = DynamicCache(config=model.config)
    if skips:
        logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
    else:  # the base model is not told that one row alone is wanted
        logits = model.lm_head(model.model(tokens, past_key_values=cache).last_hidden_state[:, -1:])
    logits[:, -1].argmax(-1).tolist()
    synchronize(tokens.device)
    return time.perf_counter() - began


def rows(
    shape: ModelConfig, contexts: list[int], turns: int, device: torch.device, write: Callable[[str], None]
) -> None:
    plain = build(shape, 0, device)
    for share in SHARES:
        trailing = round(share * shape.num_layers)
        model = build(shape, trailing, device)
        for context in contexts:
            tokens = torch.randint(0, vocab_size(shape), (1, context), device=device)
            cells = {"plain": (plain, False), "whole": (model, False), "skipping": (model, True)}
            for of, skips in cells.values():
                prefill(of, tokens, skips)  # warm
            taken: dict[str, list[float]] = {name: [] for name in cells}
            for _ in range(turns):
                for name, (of, skips) in cells.items():
                    taken[name].append(prefill(of, tokens, skips))
            saved = statistics.median(1 - a / b for a, b in zip(taken["skipping"], taken["whole"]))
            times = " | ".join(f"{1000 * statistics.median(taken[name]):.1f}" for name in cells)
            write(
                f"| {context:,} | {trailing} of {shape.num_layers} | {times} | {saved:.1%} | "
                f"{trailing / shape.num_layers:.1%} |"
            )
        del model


@entry_point
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m skv_tools.bench.prefill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with arguments.out.open("w", encoding="utf-8") as file:

        def write(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        write("# Time to first token where the last layers borrow\n")
        write(f"`python -m skv_tools.bench.prefill {' '.join(argv)}`, {arguments.turns} turns; ")
        write(f"{heading(device, package_versions(('torch', 'transformers')))}\n")
        write(HEADER)
        rows(read_shape(arguments.shape), arguments.contexts, arguments.turns, device, write)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
