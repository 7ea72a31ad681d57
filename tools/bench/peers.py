"""Speed of other trainers on one GPU: transformers, megatron-core and torchtitan, on random tokens.

    python -m skv_tools.bench.peers --peer transformers --shape qwen3-1.7b --sequence-length 2048 --micro-batch 8 \\
        --masters fp32 --out transformers.json
    python -m skv_tools.bench.peers --ceiling --out ceiling.json

A step is forward, backward and fused AdamW over the full vocabulary; the clock stops after a device synchronization.
Tokens/s is of the median step. Memory is the peak of allocated GPU memory over the timed steps. --masters says what
the optimizer works on: `none` bf16 parameters and moments; `autocast` fp32 parameters and moments under bf16 autocast;
`copies` bf16 parameters with fp32 copies, gradients and moments; `fp32` is `copies` for megatron, as Megatron-LM does
it, and `autocast` for the others, as they do it on one GPU. --ceiling times a bf16 matrix product instead. What could
not run is written as {"not_run": reason}, with exit status 0.
"""

import argparse
import contextlib
import datetime
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skv_dist.commands.entry_point import entry_point
from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError
from skv_dist.training.throughput import flops_per_token, peak_flops
from skv_dist.versions import package_versions

from ..vocabulary import vocab_size
from .machine import device_name, synchronize
from .shapes import SHAPES, read_shape, run_config

Loss = Callable[[Tensor, Tensor], Tensor]
MASTERS = {
    "none": "bf16 parameters, gradients and moments, no fp32 masters",
    "autocast": "fp32 parameters, gradients and moments, bf16 autocast",
    "copies": "bf16 parameters and gradients, fp32 master copies, fp32 accumulated gradients, fp32 moments",
}


class NotRunError(Exception):
    """Why a peer cannot run here."""


@dataclass(frozen=True)
class Peer:
    """A model to train.

    Attributes:
        parameters: what the optimizer moves.
        loss: (tokens [b, s], labels [b, s]) -> mean loss.
        description: what it does beyond what `MASTERS` says.
    """

    parameters: list[nn.Parameter]
    loss: Loss
    description: str


class Optimizer:
    """Fused AdamW on the parameters, or on fp32 copies of them."""

    def __init__(self, parameters: list[nn.Parameter], copies: bool, clip: float) -> None:
        self.parameters, self.clip = parameters, clip
        self.masters = [nn.Parameter(p.detach().float()) for p in parameters] if copies else None
        self.adam = torch.optim.AdamW(
            self.masters or parameters, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1, fused=True
        )

    def collect(self) -> None:
        """Add the gradients of one micro-batch to those of the fp32 copies."""
        if self.masters is None:
            return
        if self.masters[0].grad is None:
            for master in self.masters:
                master.grad = torch.zeros_like(master)
        torch._foreach_add_(_gradients(self.masters), _gradients(self.parameters))
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        moved = self.masters or self.parameters
        if self.clip > 0:
            torch.nn.utils.clip_grad_norm_(moved, self.clip, foreach=True)
        self.adam.step()
        if self.masters is None:
            self.adam.zero_grad(set_to_none=True)
        else:
            torch._foreach_copy_([*self.parameters], [*self.masters])
            torch._foreach_zero_(_gradients(self.masters))


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    gradients = [p.grad for p in parameters if p.grad is not None]
    if len(gradients) < len(parameters):
        raise RuntimeError(f"{len(parameters) - len(gradients)} parameters got no gradient")
    return gradients


def _dtype(masters: str) -> torch.dtype:
    return torch.float32 if masters == "autocast" else torch.bfloat16


def _transformers(shape: ModelConfig, arguments: argparse.Namespace, device: torch.device) -> Peer:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    fields = {
        "vocab_size": vocab_size(shape),
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.kv_channels,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tie_embeddings,
        "max_position_embeddings": max(arguments.sequence_length, 2048),
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    config_class, model_class = (Qwen3Config, Qwen3ForCausalLM) if shape.qk_norm else (LlamaConfig, LlamaForCausalLM)
    with _default_dtype(_dtype(arguments.masters)), device:
        model = model_class(config_class(**fields))
    model.train()
    run = model
    if arguments.compile == "model":
        run = torch.compile(model, dynamic=False)
    elif arguments.compile == "layers":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        model.loss_function = torch.compile(model.loss_function, dynamic=False)
    compiled = {"model": "whole model and loss compiled", "layers": "each layer and the loss compiled", "none": "eager"}
    # While it is traced transformers cannot see that a batch is not packed, and builds a mask, with which there is no
    # flash attention. Qwen3 takes a ready one, also none; Llama has no such way.
    masked = arguments.compile == "model" and not shape.qk_norm
    extra = {"attention_mask": {"full_attention": None}} if arguments.compile == "model" and not masked else {}

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        del labels  # transformers shifts by itself
        return run(input_ids=tokens, labels=tokens, **extra).loss

    return Peer(
        list(model.parameters()),
        loss,
        f"{model_class.__name__}, attention sdpa ({'under a mask tensor' if masked else 'causal, no mask tensor'}), "
        f"{compiled[arguments.compile]}, its own cross-entropy on logits upcast to fp32",
    )


def _megatron(shape: ModelConfig, arguments: argparse.Namespace, device: torch.device) -> Peer:
    if arguments.masters == "autocast":
        raise UserError("megatron-core casts no parameters under autocast: use --masters copies or none")
    if arguments.compile == "model":
        raise UserError("--compile model is not done for megatron: use --compile layers or none")
    from skv_dist.config.parallel import ParallelConfig
    from skv_dist.parallel.processes import groups

    groups.start(ParallelConfig())
    groups.seed_dropout(0, 0, 0)  # there is none, but Megatron draws its weights from that stream
    from megatron.core.models.gpt import GPTModel

    model = GPTModel(
        config=_megatron_config(shape, arguments.compile != "none"),
        transformer_layer_spec=_megatron_spec(shape),
        vocab_size=vocab_size(shape),
        max_sequence_length=arguments.sequence_length,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_theta),
    ).to(device=device, dtype=torch.bfloat16)  # as Megatron's Float16Module
    model.train()
    if arguments.compile == "layers":
        _compile_megatron_layers(model)

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        return model(tokens, positions, None, labels=labels).mean()

    return Peer(
        list(model.parameters()),
        loss,
        "megatron-core's GPTModel in the local spec, its core attention replaced by torch's "
        "scaled_dot_product_attention (causal, grouped queries), "
        + ("each layer compiled" if arguments.compile == "layers" else "eager, fused SwiGLU")
        + ", megatron's vocabulary-parallel cross-entropy in fp32, "
        + ("its native fusion" if arguments.fused_loss else "unfused, its default")
        + ", no DDP, no ZeRO",
    )


def _megatron_config(shape: ModelConfig, compiled: bool) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.kv_channels,
        params_dtype=torch.bfloat16,
        bf16=True,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,  # Apex's kernel
        bias_dropout_fusion=False,
        bias_activation_fusion=on_gpu and not compiled,  # compiled by itself; does not nest
        masked_softmax_fusion=False,
        apply_rope_fusion=False,  # Transformer Engine's kernel
        persist_layer_norm=False,
    )


def _megatron_spec(shape: ModelConfig) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from skv_dist.model.attention import SdpaCoreAttention

    spec = get_gpt_layer_local_spec(qk_layernorm=shape.qk_norm, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    return spec


def _compile_megatron_layers(model: Any) -> None:
    from megatron.core.utils import get_tensor_model_parallel_group_if_none

    # It warns of a deprecated argument, which would cut the graph; what it returns never changes.
    torch.compiler.assume_constant_result(get_tensor_model_parallel_group_if_none)
    # A layer's number is a constant of its graph in some versions.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in model.decoder.layers:
        layer.compile(dynamic=False)


def _torchtitan(shape: ModelConfig, arguments: argparse.Namespace, device: torch.device) -> Peer:
    try:
        arguments_module = importlib.import_module("torchtitan.models.qwen3.model.args")
        model_module = importlib.import_module("torchtitan.models.qwen3.model.model")
    except ImportError as error:  # 0.3 has moved it, and has no attention without flex or varlen
        raise NotRunError(f"torchtitan 0.2.2 and what it imports are needed: {error}") from error
    fields = arguments_module.Qwen3ModelArgs(
        dim=shape.hidden_size,
        n_layers=shape.num_layers,
        n_heads=shape.num_attention_heads,
        n_kv_heads=shape.num_kv_heads,
        head_dim=shape.kv_channels,
        hidden_dim=shape.ffn_hidden_size,
        vocab_size=vocab_size(shape),
        norm_eps=shape.norm_eps,
        rope_theta=shape.rope_theta,
        qk_norm=shape.qk_norm,
        max_seq_len=arguments.sequence_length,
        enable_weight_tying=shape.tie_embeddings,
    )
    with _default_dtype(_dtype(arguments.masters)), device:
        model = model_module.Qwen3Model(fields)
    with torch.no_grad():
        model.init_weights(device)  # beside the context: rotary tables stay fp32, as in its trainer
    model.train()

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    if arguments.compile == "layers":
        for layer in model.layers.values():
            layer.compile(fullgraph=True)
        cross_entropy = torch.compile(cross_entropy)  # its trainer compiles "model" and "loss"
    run = torch.compile(model, dynamic=False) if arguments.compile == "model" else model
    compiled = {"model": "whole model compiled", "layers": "each block and the loss compiled", "none": "eager"}
    return Peer(
        list(model.parameters()),
        lambda tokens, labels: cross_entropy(run(tokens), labels),
        "torchtitan's Qwen3Model (for Llama without its q/k norms), attention sdpa with torchtitan's order of "
        f"backends (cuDNN, flash, math), {compiled[arguments.compile]}, cross-entropy in fp32 as torchtitan's, no FSDP",
    )


PEERS: dict[str, Callable[[ModelConfig, argparse.Namespace, torch.device], Peer]] = {
    "transformers": _transformers,
    "megatron": _megatron,
    "torchtitan": _torchtitan,
}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating-point tensors have this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _batches(vocab_size: int, arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh random tokens and the next token of each, without end."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (arguments.micro_batch, arguments.sequence_length)
    while True:
        tokens = torch.randint(0, vocab_size, shape, generator=generator, device=device)
        yield tokens, tokens.roll(-1, 1)


def _train(peer: Peer, shape: ModelConfig, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Warm up, then time each step."""
    optimizer = Optimizer(peer.parameters, arguments.masters == "copies", arguments.clip)
    batches = _batches(vocab_size(shape), arguments, device)
    autocast = arguments.masters == "autocast"
    seconds, losses = [], []
    for step in range(arguments.warmup + arguments.steps):
        if step == arguments.warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        drawn = [next(batches) for _ in range(arguments.accumulate)]
        synchronize(device)
        began = time.perf_counter()
        step_loss = torch.zeros((), device=device)
        for tokens, labels in drawn:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = peer.loss(tokens, labels) / arguments.accumulate
            loss.backward()
            optimizer.collect()
            step_loss += loss.detach()
        optimizer.step()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
        losses.append(step_loss.item())
    return _summary(seconds, losses, shape, arguments, device)


def _summary(
    seconds: list[float], losses: list[float], shape: ModelConfig, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    timed = sorted(seconds[arguments.warmup :])
    median = statistics.median(timed)
    batch_size = arguments.micro_batch * arguments.accumulate
    tokens = batch_size * arguments.sequence_length
    batch = {"global_batch_size": batch_size, "micro_batch_size": arguments.micro_batch}
    run = run_config(shape, arguments.sequence_length, {"steps": arguments.steps, **batch})
    rate = flops_per_token(run) * tokens / median
    peak = peak_flops(device)
    return {
        "tokens_per_second": tokens / median,
        "model_tflops_per_second": rate / 1e12,
        "mfu": rate / peak if peak else None,
        "step_seconds": {"median": median, "min": timed[0], "p90": timed[int(0.9 * (len(timed) - 1))]},
        "warmup_seconds": sum(seconds[: arguments.warmup]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def _ceiling(size: int, device: torch.device) -> dict[str, Any]:
    """TFLOP/s of a bf16 matrix product [size, size] x [size, size] on random data."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    for _ in range(5):
        torch.mm(left, right, out=out)
    rates = []
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(10):
            torch.mm(left, right, out=out)
        synchronize(device)
        rates.append(10 * 2 * size**3 / (time.perf_counter() - began) / 1e12)
    return {"bf16_matmul": size, "tflops_per_second": statistics.median(rates), "best": max(rates)}


def _environment(device: torch.device) -> dict[str, Any]:
    packages = package_versions(("torch", "triton", "transformers", "megatron-core", "torchtitan"))
    return {
        "date": str(datetime.date.today()),
        "device": device_name(device),
        "command": "python -m skv_tools.bench.peers " + " ".join(sys.argv[1:]),
        "software": f"Python {platform.python_version()}, {packages}",
    }


def _run_peer(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    shape = read_shape(arguments.shape)
    if arguments.masters == "fp32":
        arguments.masters = "copies" if arguments.peer == "megatron" else "autocast"
    if arguments.compile is None:
        whole = arguments.peer == "transformers" and shape.qk_norm  # see _transformers
        arguments.compile = "model" if whole else "layers"
    record: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("peer", "shape", "sequence_length", "micro_batch", "accumulate", "masters", "compile", "steps")
    }
    try:
        peer = PEERS[arguments.peer](shape, arguments, device)
        clip = f"gradients clipped to {arguments.clip:g}" if arguments.clip > 0 else "no gradient clipping"
        record["description"] = (
            f"{peer.description}; {MASTERS[arguments.masters]}, fused AdamW; no activation checkpointing; {clip}"
        )
        record["parameters"] = sum(p.numel() for p in peer.parameters)
        record |= _train(peer, shape, arguments, device)
    except NotRunError as reason:
        record["not_run"] = str(reason)
    except torch.OutOfMemoryError as error:
        record["not_run"] = f"out of memory: {str(error).splitlines()[0]}"
    return record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=PEERS)
    parser.add_argument("--ceiling", action="store_true", help="time a bf16 matrix product")
    parser.add_argument("--size", type=int, default=8192, help="its width (default: 8192)")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="N")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="B")
    parser.add_argument("--accumulate", type=int, default=1, metavar="K", help="micro-batches of a step (default: 1)")
    parser.add_argument("--masters", choices=["fp32", *MASTERS], default="fp32")
    parser.add_argument(
        "--compile", choices=["model", "layers", "none"], help="default: model for transformers' Qwen3, else layers"
    )
    parser.add_argument("--clip", type=float, default=0.0, help="gradient norm to clip to (default: 0, no clipping)")
    parser.add_argument("--fused-loss", action="store_true", help="megatron: its native fused cross-entropy")
    parser.add_argument("--steps", type=int, default=30, help="timed steps (default: 30)")
    parser.add_argument("--warmup", type=int, default=8, help="steps before them (default: 8)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    return parser


@entry_point
def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.ceiling == (arguments.peer is not None):
        raise UserError("give either --peer or --ceiling")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    record = _ceiling(arguments.size, device) if arguments.ceiling else _run_peer(arguments, device)
    record |= _environment(device)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
