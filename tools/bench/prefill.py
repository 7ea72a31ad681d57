"""Time to first token where the last layers all borrow: they run over the last position alone.

    python -m skv_tools.bench.prefill --out prefill.md                      # Qwen3-8B's shape, 8K and 32K, on a GPU
    python -m skv_tools.bench.prefill --shape small --contexts 2048 --out prefill.md        # on a CPU
    python -m skv_tools.bench.prefill --model trained --shape small --contexts 2048 --out prefill.md

The model has random weights, bf16 on a GPU and float32 on a CPU. It is the exported one (`modeling_skv.py`) in
transformers or, with `--model trained`, the one that is trained, which `skv-eval` decodes with. For maps in which the
last quarter, half and three quarters of the layers borrow: the prefill into an empty cache and its argmax, with
skipping, without it, and with no layer sharing at all. The three take turns; what is shown is the median of the turns,
and by how much less the first takes than the second, pair by pair. Bound: the share of layers that borrow.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from skv_dist.commands.entry_point import entry_point
from skv_dist.config.model import ModelConfig
from skv_dist.parallel.decode import Decoder, likeliest
from skv_dist.parallel.engines.frozen import FrozenEngine
from skv_dist.parallel.initial_values import local_initial_values
from skv_dist.parallel.processes import groups
from skv_dist.routing import RoutePlan
from skv_dist.versions import package_versions

from ..engines.models.modeling_skv import SkvConfig, SkvForCausalLM
from ..vocabulary import vocab_size
from .machine import heading, synchronize
from .paired_row import SHARES, paired_row
from .shapes import SHAPES, read_shape, run_config, with_vocabulary

HEADER = (
    "| context | layers that trail | no sharing, ms | whole rows, ms | skipping, ms | saved by skipping | bound |\n"
    "|---|---|---|---|---|---|---|"
)

Prefill = Callable[[torch.Tensor], object]  # of tokens [1, s], into an empty cache; waits for the argmax
Model = Callable[[int], tuple[Prefill, Prefill]]  # by the number of layers that trail: with skipping and without


def sources(shape: ModelConfig, trailing: int) -> list[int]:
    """The last ``trailing`` layers borrow from the one before them."""
    owners = shape.num_layers - trailing
    return [min(layer, owners - 1) for layer in range(shape.num_layers)]


def build(shape: ModelConfig, trailing: int, device: torch.device) -> Any:
    """The exported model with random weights."""
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
        kv_source_layers=sources(shape, trailing),
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            return SkvForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def exported(shape: ModelConfig, context: int, device: torch.device) -> Model:
    """In transformers."""

    def with_trailing(trailing: int) -> tuple[Prefill, Prefill]:
        model = build(shape, trailing, device)

        def skipping(tokens: torch.Tensor) -> object:
            cache = DynamicCache(config=model.config)
            return model(tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1).tolist()

        def whole(tokens: torch.Tensor) -> object:  # the base model is not told that one row alone is wanted
            hidden = model.model(tokens, past_key_values=DynamicCache(config=model.config)).last_hidden_state
            return model.lm_head(hidden[:, -1:]).argmax(-1).tolist()

        return skipping, whole

    return with_trailing


class WholeRows(RoutePlan):
    """A map whose trailing layers run over all positions."""

    trailing = range(0)


def trained(shape: ModelConfig, context: int, device: torch.device) -> Model:
    """By `skv_dist.parallel.decode`, in one process. One set of weights serves all maps."""
    precision = "bf16" if device.type == "cuda" else "fp32"
    train = {"precision": precision, "steps": 1, "micro_batch_size": 1, "global_batch_size": 1}
    run = with_vocabulary(run_config(shape, context + 1, train))
    engine = FrozenEngine(run, groups.start(run.parallel).device)
    engine.assign(local_initial_values(run, engine.model))

    def with_trailing(trailing: int) -> tuple[Prefill, Prefill]:
        def prefill(plan: RoutePlan) -> Prefill:
            decoder = Decoder(engine, run, plan)
            return lambda tokens: decoder.continue_prompts(tokens.tolist(), 1, frozenset(), likeliest, pad=0)

        table = sources(shape, trailing)
        return prefill(RoutePlan(table)), prefill(WholeRows(table))

    return with_trailing


MODELS = {"exported": exported, "trained": trained}


@torch.no_grad()
def seconds(prefill: Prefill, tokens: torch.Tensor) -> float:
    synchronize(tokens.device)
    began = time.perf_counter()
    prefill(tokens)
    return time.perf_counter() - began


def rows(
    shape: ModelConfig,
    model: Model,
    contexts: list[int],
    turns: int,
    device: torch.device,
    write: Callable[[str], None],
) -> None:
    _, plain = model(0)
    for share in SHARES:
        trailing = round(share * shape.num_layers)
        skipping, whole = model(trailing)
        for context in contexts:
            tokens = torch.randint(0, vocab_size(shape), (1, context), device=device)
            cells = {"plain": plain, "whole": whole, "skipping": skipping}
            timed = {name: partial(seconds, prefill, tokens) for name, prefill in cells.items()}
            write(paired_row(context, trailing, shape.num_layers, timed, turns))
        del skipping, whole


@entry_point
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m skv_tools.bench.prefill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="exported")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packages = ("torch", "transformers") if arguments.model == "exported" else ("torch", "megatron-core")
    with arguments.out.open("w", encoding="utf-8") as file:

        def write(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        write("# Time to first token where the last layers borrow\n")
        write(f"`python -m skv_tools.bench.prefill {' '.join(argv)}`, {arguments.turns} turns; ")
        write(f"{heading(device, package_versions(packages))}\n")
        write(HEADER)
        shape = read_shape(arguments.shape)
        model = MODELS[arguments.model](shape, max(arguments.contexts), device)
        rows(shape, model, arguments.contexts, arguments.turns, device, write)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
