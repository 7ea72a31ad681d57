"""Our parameters and those of transformers' models, one by one.

Ours are fused: QKV group by group (the queries of a group, its key, its value), gate above up
(parallel/tensor_split.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

import torch

from skv_dist.config.model import ModelConfig

from ..vocabulary import vocab_size
from .blocks import BLOCKS, Constant, Shape


class Fusion(StrEnum):
    """How several tensors of theirs are one of ours."""

    NONE = "none"
    QKV = "qkv"
    GATE_UP = "gate_up"


class Entry(NamedTuple):
    """One of our parameters and what it is made of there, or a constant that is only there.

    Attributes:
        ours: name in a checkpoint, without ``model.``; None for a constant.
        theirs: names and shapes in a Hugging Face folder, in the order of `split`.
        value: of a constant.
        rows: where one tensor of theirs holds several parts, one above the other, the rows of each.
    """

    ours: str | None
    theirs: Mapping[str, Shape]
    fusion: Fusion = Fusion.NONE
    value: float = 0.0
    rows: tuple[int, ...] = ()


def entries(model: ModelConfig, joined: Mapping[str, Sequence[str]] | None = None) -> Iterator[Entry]:
    """All parameters and constants, in the order of the forward.

    Args:
        joined: see `skv_tools.convert.families.Family`.
    """
    embedding = (vocab_size(model), model.hidden_size)
    yield Entry("embedding.weight", {"model.embed_tokens.weight": embedding})
    for layer in range(model.num_layers):
        for entry in (_joined(entry, joined or {}) for entry in _of_layer(model)):
            ours = None if entry.ours is None else f"layers.{layer}.{entry.ours}"
            yield entry._replace(ours=ours, theirs=_prefixed(f"model.layers.{layer}.", entry.theirs))
    for constant in BLOCKS[model.block].model_constants:
        yield _constant(constant, model, "model.")
    yield Entry("final_norm.weight", {"model.norm.weight": (model.hidden_size,)})
    if not model.tie_embeddings:
        yield Entry("output_layer.weight", {"lm_head.weight": embedding})


def _of_layer(model: ModelConfig) -> Iterator[Entry]:
    """Entries of any one layer, named within it."""
    hidden, ffn, width = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    queries, keys = model.num_attention_heads * width, model.num_kv_heads * width
    block = BLOCKS[model.block]
    qkv = {f"self_attn.{part}_proj": rows for part, rows in zip("qkv", (queries, keys, keys))}
    yield from _linear("self_attention.linear_qkv", qkv, hidden, "qkv" in model.biases, Fusion.QKV)
    gate_up = {f"mlp.{part}_proj": ffn for part in ("gate", "up")}
    yield from _linear("mlp.linear_fc1", gate_up, hidden, "mlp" in model.biases, Fusion.GATE_UP)
    has_bias = "attention_output" in model.biases
    yield from _linear("self_attention.linear_proj", {"self_attn.o_proj": hidden}, queries, has_bias)
    yield from _linear("mlp.linear_fc2", {"mlp.down_proj": hidden}, ffn, "mlp" in model.biases)
    for ours, theirs in block.norms.items():
        yield Entry(f"{ours}.weight", {f"{theirs}.weight": (hidden,)})
    normed = (queries, keys) if model.block_style.qk_norm_over == "all_heads" else (width, width)
    for part, size in zip("qk", normed) if model.qk_norm else ():
        yield Entry(f"self_attention.{part}_layernorm.weight", {f"self_attn.{part}_norm.weight": (size,)})
    for constant in block.layer_constants:
        yield _constant(constant, model)


def _linear(
    ours: str, theirs: Mapping[str, int], width: int, has_bias: bool, fusion: Fusion = Fusion.NONE
) -> Iterator[Entry]:
    """A linear module, of one or more of theirs with so many rows each."""
    yield Entry(f"{ours}.weight", {f"{name}.weight": (rows, width) for name, rows in theirs.items()}, fusion)
    if has_bias:
        yield Entry(f"{ours}.bias", {f"{name}.bias": (rows,) for name, rows in theirs.items()}, fusion)


def _joined(entry: Entry, joined: Mapping[str, Sequence[str]]) -> Entry:
    """The entry where one tensor holds what others have in several."""
    names = [name.rpartition(".")[0] for name in entry.theirs]
    for whole, parts in joined.items():
        if list(parts) == names:
            shapes, kind = list(entry.theirs.values()), next(iter(entry.theirs)).rpartition(".")[2]
            rows = tuple(shape[0] for shape in shapes)
            return entry._replace(theirs={f"{whole}.{kind}": (sum(rows), *shapes[0][1:])}, rows=rows)
    return entry


def _constant(constant: Constant, model: ModelConfig, prefix: str = "") -> Entry:
    return Entry(None, {prefix + constant.name: constant.shape(model)}, value=constant.value)


def _prefixed(prefix: str, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {prefix + name: shape for name, shape in shapes.items()}


def fuse(entry: Entry, parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Our parameter from their tensors, each [rows, hidden], or [rows] of a bias."""
    if entry.rows:
        parts = parts[0].split(entry.rows)
    if entry.fusion is Fusion.QKV:
        # [groups * heads of a group * width, ...] -> [groups, heads of a group, width, ...]
        grouped = [part.unflatten(0, (model.num_kv_heads, -1, model.kv_channels)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 2)
    return torch.cat(list(parts)) if entry.fusion is Fusion.GATE_UP else parts[0]


def split(entry: Entry, ours: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """Their tensors from our parameter: the inverse of `fuse`."""
    parts = [ours]
    if entry.fusion is Fusion.QKV:
        heads = model.num_attention_heads // model.num_kv_heads
        # [groups * (heads + 2) * width, ...] -> [groups, heads + 2, width, ...]: queries, a key, a value
        grouped = ours.unflatten(0, (model.num_kv_heads, heads + 2, model.kv_channels))
        parts = [part.flatten(0, 2) for part in grouped.split([heads, 1, 1], dim=1)]
    elif entry.fusion is Fusion.GATE_UP:
        parts = list(ours.chunk(2))
    return [torch.cat(parts)] if entry.rows else parts


def is_left_out(name: str, weight_layers: Sequence[int]) -> bool:
    """Whether ``name`` is a key or value projection or key norm of a layer that is none of ``weight_layers``."""
    parts = name.split(".")
    return parts[-2] in ("k_proj", "v_proj", "k_norm") and int(parts[2]) not in weight_layers
