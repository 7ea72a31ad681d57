"""Prefill and decoding of an exported model whose layers share K/V in groups of g: memory, latency, speed.

    python -m skv_tools.bench.decode --out decode.md                    # Qwen3-8B's shape, 8K batch 1 first
    python -m skv_tools.bench.decode --eager --minutes 3 --out eager.md
    python -m skv_tools.bench.decode --shape tiny --out tiny.md         # tries the command on a CPU

The model is the exported one (`modeling_skv.py`) in bf16 with random weights; g=1 is the same code with every layer its
own source. One set of weights serves all g. Measured per cell (context, batch), mode and g: bytes that the cache holds,
from its storages; TTFT, the prefill and its argmax, where logits are made of the last position only; decoding speed,
greedy, the argmax fed back on the device; peak allocated memory. Eager decoding at a small batch waits for the host to
launch kernels, whose speed drifts on a shared machine: all g take turns, and the speed is the median over 8 tokens at a
time of all turns.

Modes: `eager` is transformers' DynamicCache and nothing compiled. `compiled` is its StaticCache, with norms and MLPs
compiled and the whole decoding step replayed as one CUDA graph; with --whole-model `torch.compile` of the step in mode
"reduce-overhead", which takes about a minute a row. With a StaticCache transformers' sdpa gets a mask, and
before 5.23 (under torch.compile, also after) copies K/V to all query heads for every layer and token; `--attention
grouped`, the default of `compiled`, multiplies grouped queries with the cache as it lies. A row is written as soon
as it is measured.
"""

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from skv_dist.commands.entry_point import entry_point
from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError
from skv_dist.versions import package_versions

from ..engines.models.modeling_skv import SkvConfig, SkvForCausalLM
from ..vocabulary import vocab_size
from .machine import heading, synchronize
from .shapes import SHAPES, read_shape

GROUPS = (1, 2, 4, 8)
WARM_TOKENS = 4  # decoded before the clock starts
CHUNK = 8  # tokens between two looks at the clock
HEADER = (
    "| context | batch | mode | g | KV MiB | KV of g=1 | TTFT ms | decode tok/s per sequence | of g=1 | decode tok/s, "
    "all | peak GiB |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Cell:
    """Four rows of the table, one for each g: ``mode`` is eager or compiled."""

    context: int
    batch: int
    mode: str

    @property
    def turns(self) -> int:
        return 1 if self.mode == "compiled" else 3 if self.context * self.batch <= 32768 else 2


@dataclass
class Figures:
    """What was measured: bytes, seconds of each prefill and of each `CHUNK` of tokens, bytes (0 on a CPU)."""

    kv_bytes: int = 0
    prefills: list[float] = field(default_factory=list)
    chunks: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def ttft(self) -> float:
        return statistics.median(self.prefills[1:] or self.prefills)

    @property
    def rate(self) -> float:
        """Tokens/s of one sequence."""
        return CHUNK / statistics.median(self.chunks)


@dataclass(frozen=True)
class Bench:
    """What all cells have in common."""

    device: torch.device
    vocab_size: int
    tokens: int
    attention: str | None
    whole_model: bool


def cells(scale: int, modes: list[str]) -> list[Cell]:
    """In order of importance; ``scale`` divides the contexts."""
    settings = [(8192, 1), (2048, 1), (32768, 1), (8192, 16), (8192, 4), (8192, 32), (8192, 8), (8192, 2)]
    return [
        Cell(context // scale, batch, mode)
        for context, batch in settings
        for mode in modes
        if mode == "eager" or batch in (1, 16)  # each row of the other costs compilation or capture
    ]


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, but a decoding step under a mask reads K/V in place: no copy for each query head.

    query [b, q, 1, d], key and value [b, k, s, d], mask [b or 1, 1, 1, s] (bool) -> [b, 1, q, d].
    """
    if query.shape[2] != 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch, heads, _, width = query.shape
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], width)  # [b, k, q/k, d]
    scores = (grouped @ key.transpose(2, 3)).float() * kwargs["scaling"]  # [b, k, q/k, s]
    scores = scores.masked_fill(~attention_mask, torch.finfo(torch.float32).min)
    out = scores.softmax(-1).to(value.dtype) @ value
    return out.view(batch, 1, heads, width), None


def build_full(shape: ModelConfig, device: torch.device) -> SkvForCausalLM:
    """The model of g=1 with random weights in bf16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = SkvForCausalLM(_config(shape, 1))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def build_group(shape: ModelConfig, full: SkvForCausalLM, group: int) -> SkvForCausalLM:
    """The model of group size ``group`` over the weights of ``full``."""
    with torch.device("meta"):
        model = SkvForCausalLM(_config(shape, group))
    weights = full.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    model.tie_weights()
    model.model.rotary_emb = full.model.rotary_emb  # its buffers are in no state_dict
    return model.eval().requires_grad_(False)


def _config(shape: ModelConfig, group: int) -> SkvConfig:
    layers = shape.num_layers
    return SkvConfig(
        vocab_size=vocab_size(shape),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.kv_channels,
        rms_norm_eps=shape.norm_eps,
        max_position_embeddings=65536,
        tie_word_embeddings=shape.tie_embeddings,
        qk_norm=shape.qk_norm,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        kv_source_layers=[layer - layer % group for layer in range(layers)],
        attn_implementation="sdpa",
    )


class CompiledParts:
    """Norms and MLPs compiled, whose code all layers and models have in common: seconds instead of minutes."""

    def __init__(self, models: list[SkvForCausalLM]) -> None:
        self.parts = [
            part for model in models for part in model.modules() if isinstance(part, (LlamaMLP, LlamaRMSNorm))
        ]
        for part in self.parts:
            part.compile()
        self.compiled = [part._compiled_call_impl for part in self.parts]

    def use(self, on: bool) -> None:
        for part, compiled in zip(self.parts, self.compiled):
            part._compiled_call_impl = compiled if on else None


def kv_bytes(cache: Any) -> int:
    """Size of the storages behind the cache, each once."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def measure(bench: Bench, model: SkvForCausalLM, cell: Cell, figures: Figures) -> None:
    """One turn of one row, added to ``figures``. Its caches are gone when it returns."""
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model.set_attn_implementation(bench.attention or ("sdpa" if cell.mode == "eager" else "grouped"))
    generator = torch.Generator(bench.device).manual_seed(0)
    prompt = torch.randint(0, bench.vocab_size, (cell.batch, cell.context), generator=generator, device=bench.device)
    cache: Any = None
    token = None
    for _ in range(2 if cell.turns == 1 else 1):
        cache = token = None  # before the next one is made
        cache = _new_cache(model, cell, bench.tokens)
        synchronize(bench.device)
        began = time.perf_counter()
        token = _step(model, cache, prompt)
        synchronize(bench.device)
        figures.prefills.append(time.perf_counter() - began)
    assert token is not None
    decode = _decoder(bench, model, cell, cache, token)
    if cell.mode == "eager" and not figures.chunks:
        # Rehearsed: cuDNN makes a plan for every new length of the cache, and whoever comes first would pay for all.
        for _ in range(bench.tokens):
            decode()
        for layer in cache.layers:  # transformers 5.17's `crop` stumbles over the layers that hold nothing
            if layer.keys is not None:
                layer.keys, layer.values = layer.keys[:, :, : -bench.tokens], layer.values[:, :, : -bench.tokens]
    for _ in range(bench.tokens // CHUNK):
        synchronize(bench.device)
        began = time.perf_counter()
        for _ in range(CHUNK):
            decode()
        synchronize(bench.device)
        figures.chunks.append(time.perf_counter() - began)
    figures.kv_bytes = kv_bytes(cache)
    if on_gpu:
        figures.peak_bytes = max(figures.peak_bytes, torch.cuda.max_memory_allocated())


def _new_cache(model: SkvForCausalLM, cell: Cell, tokens: int) -> Any:
    if cell.mode == "eager":
        return DynamicCache(config=model.config)
    length = cell.context + tokens + 2 * WARM_TOKENS
    return StaticCache(config=model.config, max_cache_len=-(-length // 64) * 64)


def _step(model: SkvForCausalLM, cache: Any, tokens: Tensor) -> Tensor:
    """tokens [b, s] -> the most likely next one [b, 1]."""
    out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1)


def _decoder(bench: Bench, model: SkvForCausalLM, cell: Cell, cache: Any, first: Tensor) -> Callable[[], object]:
    """A function that decodes one more token; warmed up."""
    token = first.clone()
    step = _step
    if cell.mode == "compiled" and bench.whole_model:
        step = torch.compile(_step, mode="reduce-overhead", dynamic=False)

    def decode() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        token.copy_(step(model, cache, token))

    for _ in range(WARM_TOKENS):
        decode()
    if cell.mode == "eager" or bench.whole_model or bench.device.type != "cuda":
        return decode
    return _captured(decode)


def _captured(decode: Callable[[], None]) -> Callable[[], object]:
    """``decode`` as one CUDA graph: its inputs and outputs are tensors that stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_TOKENS - 1):
            decode()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode()
    graph.replay()
    return graph.replay


def attempt(bench: Bench, model: SkvForCausalLM, cell: Cell, figures: Figures) -> str | None:
    """One turn; in a few words what went wrong, if something did."""
    problem = None
    try:
        with torch.no_grad():
            measure(bench, model, cell, figures)
    except torch.OutOfMemoryError:
        problem = "out of memory"
    except RuntimeError as error:
        problem = f"failed: {str(error).splitlines()[0]}"
    # Outside the handlers, whose traceback holds the cell's tensors.
    if bench.whole_model:
        torch.compiler.reset()  # frees what its CUDA graphs hold
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return problem


def rows(bench: Bench, models: dict[int, SkvForCausalLM], cell: Cell) -> str:
    """The lines of one cell. All g take turns, so that a slow spell of the machine falls on all of them."""
    figures = {group: Figures() for group in models}
    problems: dict[int, str] = {}
    for _ in range(cell.turns):
        for group in [group for group in models if group not in problems]:
            problem = attempt(bench, models[group], cell, figures[group])
            if problem is not None:
                problems[group] = problem
    lines = []
    for group, row in figures.items():
        start = f"| {cell.context} | {cell.batch} | {cell.mode} | {group} |"
        if group in problems:
            lines.append(f"{start} {problems[group]} | – | – | – | – | – | – |\n")
            continue
        memory = speed = "–"
        if 1 not in problems:
            memory, speed = f"{row.kv_bytes / figures[1].kv_bytes:.3f}", f"{row.rate / figures[1].rate:.2f}"
        peak = f"{row.peak_bytes / 2**30:.1f}" if row.peak_bytes else "–"
        lines.append(
            f"{start} {row.kv_bytes / 2**20:.1f} | {memory} | {row.ttft * 1e3:.1f} | {row.rate:.1f} | {speed} | "
            f"{row.rate * cell.batch:.1f} | {peak} |\n"
        )
    return "".join(lines)


def _head(bench: Bench, shape: str) -> str:
    """Everything that the figures depend on, and the head of the table."""
    versions = f"Python {platform.python_version()}, {package_versions(('torch', 'transformers'))}"
    attention = bench.attention or "sdpa in eager, grouped in compiled"
    compiled = (
        "the step under torch.compile(mode='reduce-overhead')"
        if bench.whole_model
        else "norms and MLPs compiled, one CUDA graph a step (no graph on a CPU)"
    )
    return (
        f"{heading(bench.device, versions)}; {shape}, bf16, random weights, {bench.tokens} tokens a turn; "
        f"attention {attention}; compiled: StaticCache, {compiled}. Peak memory includes the weights of g=1, K/V "
        f"projections of all layers.\n\n`python -m skv_tools.bench.decode {' '.join(sys.argv[1:])}`\n\n{HEADER}\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b", help="tiny: contexts are 1/64 as long")
    parser.add_argument("--eager", action="store_true", help="only the eager mode")
    parser.add_argument("--compiled", action="store_true", help="only the compiled mode")
    parser.add_argument("--attention", choices=["sdpa", "grouped"], help="in both modes (default: see above)")
    parser.add_argument("--whole-model", action="store_true", help="compile the step as a whole")
    parser.add_argument("--tokens", type=int, default=32, help=f"decoded a turn, in whole {CHUNK}s (default: 32)")
    parser.add_argument("--minutes", type=float, default=1e9, metavar="M", help="start no further cell after that")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md")
    return parser


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    """All cells, each written as soon as it is known."""
    ends = time.monotonic() + 60 * arguments.minutes
    shape = read_shape(arguments.shape)
    bench = Bench(device, vocab_size(shape), arguments.tokens, arguments.attention, arguments.whole_model)
    modes = [mode for mode in ("eager", "compiled") if getattr(arguments, mode)] or ["eager", "compiled"]
    torch._dynamo.config.recompile_limit = 64
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    full = build_full(shape, device)
    models = {group: build_group(shape, full, group) for group in GROUPS}
    del full
    with arguments.out.open("w") as file:
        _write(file, _head(bench, arguments.shape))
        parts = None if arguments.whole_model else CompiledParts(list(models.values()))
        for cell in cells(64 if arguments.shape == "tiny" else 1, modes):
            if time.monotonic() > ends:
                _write(file, f"\nStopped after {arguments.minutes:g} minutes, before {cell}.\n")
                break
            if parts is not None:
                parts.use(cell.mode == "compiled")
            _write(file, rows(bench, models, cell))


def _write(file: Any, text: str) -> None:
    file.write(text)
    file.flush()
    print(text, end="", flush=True)


@entry_point
def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.tokens < CHUNK or arguments.tokens % CHUNK:
        raise UserError(f"--tokens must be a multiple of {CHUNK}, got {arguments.tokens}")
    run(arguments, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
