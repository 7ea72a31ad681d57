"""Our parameters and those of transformers' Llama, Qwen3, Mistral and Gemma 4, one by one.

Ours are fused: QKV group by group (the queries of a group, its key, its value), gate above up (model/sharding.py).
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from skv_dist.config.model import ModelConfig

_BLOCK = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "input_layernorm.weight": "input_layernorm.weight",
}
_BLOCK_NORMS = {
    "llama": {"pre_mlp_layernorm.weight": "post_attention_layernorm.weight"},
    "gemma4": {
        "post_attention_norm.weight": "post_attention_layernorm.weight",
        "pre_mlp_layernorm.weight": "pre_feedforward_layernorm.weight",
        "post_mlp_norm.weight": "post_feedforward_layernorm.weight",
    },
}
# What Gemma 4 adds to each layer from an embedding of its own, of width 1 and zero here, so that it adds nothing: stock
# transformers 5.23 cannot do without it where layers share K/V (its `_maybe_slice_kv_shared_inputs`).
_PER_LAYER = ("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm")
_PER_LAYER_INPUTS = ("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")
_NORMS = {"self_attention.q_layernorm.weight": "self_attn.q_norm.weight"}
_KEY_NORMS = {"self_attention.k_layernorm.weight": "self_attn.k_norm.weight"}


class Entry(NamedTuple):
    """One of our parameters, and what it is made of there.

    Attributes:
        ours: name in a checkpoint, without ``model.``; empty where theirs is a constant that we do not have.
        theirs: names in a Hugging Face folder, in the order of `split`.
        kind: how the parts lie in ours.
        layer: the layer; None outside the layers.
    """

    ours: str
    theirs: tuple[str, ...]
    kind: Literal["plain", "qkv", "halves", "ones", "zeros"]
    layer: int | None


def entries(model: ModelConfig) -> Iterator[Entry]:
    """All parameters, in the order of the forward."""
    yield Entry("embedding.weight", ("model.embed_tokens.weight",), "plain", None)
    for layer in range(model.num_layers):
        mine, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        qkv = tuple(f"{theirs}self_attn.{x}_proj.weight" for x in "qkv")
        yield Entry(f"{mine}self_attention.linear_qkv.weight", qkv, "qkv", layer)
        gate_up = tuple(f"{theirs}mlp.{x}_proj.weight" for x in ("gate", "up"))
        yield Entry(f"{mine}mlp.linear_fc1.weight", gate_up, "halves", layer)
        norms = {**_NORMS, **_KEY_NORMS} if model.qk_norm else {}
        for ours, name in {**_BLOCK, **_BLOCK_NORMS[model.block], **norms}.items():
            yield Entry(mine + ours, (theirs + name,), "plain", layer)
        if model.block == "gemma4":
            yield Entry("", (f"{theirs}layer_scalar",), "ones", layer)  # a factor of the layer's output
            yield Entry("", tuple(f"{theirs}{name}.weight" for name in _PER_LAYER), "zeros", layer)
    if model.block == "gemma4":
        yield Entry("", tuple(f"model.{name}.weight" for name in _PER_LAYER_INPUTS), "zeros", None)
    yield Entry("final_norm.weight", ("model.norm.weight",), "plain", None)
    if not model.tie_embeddings:
        yield Entry("output_layer.weight", ("lm_head.weight",), "plain", None)


def shapes(entry: Entry, model: ModelConfig, vocab_size: int) -> list[tuple[int, ...]]:
    """Shapes of ``entry.theirs``."""
    hidden, width = model.hidden_size, model.kv_channels
    kind = entry.ours.split(".", 2)[-1] if entry.layer is not None else entry.ours
    if entry.kind == "qkv":
        return [(heads * width, hidden) for heads in (model.num_attention_heads, *[model.num_kv_heads] * 2)]
    if entry.kind == "halves":
        return [(model.ffn_hidden_size, hidden)] * 2
    if entry.kind == "ones":
        return [(1,)]
    if entry.kind == "zeros":
        within, layers = [(1, hidden), (hidden, 1), (hidden,)], model.num_layers
        return list(within if entry.layer is not None else [(vocab_size, layers), (layers, hidden), (1,)])
    if kind.endswith(("q_layernorm.weight", "k_layernorm.weight")):
        return [(width,)]
    known = {
        "self_attention.linear_proj.weight": (hidden, model.num_attention_heads * width),
        "mlp.linear_fc2.weight": (hidden, model.ffn_hidden_size),
        "embedding.weight": (vocab_size, hidden),
        "output_layer.weight": (vocab_size, hidden),
    }
    return [known.get(kind, (hidden,))]


def fuse(entry: Entry, parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Our parameter from their tensors."""
    if entry.kind == "qkv":
        grouped = [part.view(model.num_kv_heads, -1, model.kv_channels, part.shape[-1]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 2)
    return torch.cat(list(parts)) if entry.kind == "halves" else parts[0]


def split(entry: Entry, ours: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """Their tensors from our parameter: the inverse of `fuse`."""
    if entry.kind == "qkv":
        heads = model.num_attention_heads // model.num_kv_heads
        grouped = ours.view(model.num_kv_heads, heads + 2, model.kv_channels, ours.shape[-1])
        return [part.flatten(0, 2) for part in grouped.split([heads, 1, 1], dim=1)]
    return list(ours.chunk(2)) if entry.kind == "halves" else [ours]


def is_left_out(name: str, owners: Sequence[int] | None) -> bool:
    """Whether the key or value projection or key norm ``name`` belongs to a layer that is none of ``owners``."""
    parts = name.split(".")
    if owners is None or parts[-2] not in ("k_proj", "v_proj", "k_norm"):
        return False
    return int(parts[2]) not in owners
