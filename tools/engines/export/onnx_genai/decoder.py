"""The nodes of the model.

Layers that share get no ``past``/``present`` of their own: their GroupQueryAttention takes empty keys and values, and
as its past what the source's has just written. To the runtime the model has as many layers as owners, so it allocates
that many caches.

Axes: b sequences, s new tokens, t tokens so far, h hidden, d a head's width.
"""

import math
from typing import Any

import numpy as np

from .graph import MICROSOFT, Graph
from .quantized import BLOCK, bits_of, quantize
from .weights import Array, float32

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NORM = "SimplifiedLayerNormalization"  # ONNX Runtime's name for RMSNorm


def cache_names(prefix: str, owner: int) -> list[str]:
    """Key and value of a cache, before (``past_key_values``) or after the new tokens (``present``).

    Args:
        owner: the number of the cache; owners are counted from the first layer on.
    """
    return [f"{prefix}.{owner}.key", f"{prefix}.{owner}.value"]


def add_decoder(graph: Graph, config: dict[str, Any], weights: dict[str, Array], *, is_int4: bool = False) -> None:
    """Put all nodes of the model into ``graph``, from ``input_ids`` [b, s] to ``logits`` [b, s, V].

    Args:
        is_int4: weights are kept in as many bits as `bits_of` says.
    """
    _Decoder(graph, config, weights, is_int4).add()


class _Decoder:
    def __init__(self, graph: Graph, config: dict[str, Any], weights: dict[str, Array], is_int4: bool) -> None:
        self.graph, self.config, self.weights, self.is_int4 = graph, config, weights, is_int4
        self.heads, self.width = config["num_attention_heads"], config["head_dim"]
        self.groups = config["num_key_value_heads"]
        self.epsilon, self.qk_norm = config["rms_norm_eps"], config["qk_norm"]
        self.sources: list[int] = config["kv_source_layers"]
        self.owners = sorted(set(self.sources))

    def add(self) -> None:
        self._add_constants()
        self.last, self.total = self._lengths()
        if len(self.owners) < len(self.sources):
            self._add_empty_keys()
        residual = self._embed()
        branch: str | None = None  # what is to be added to the residual before the next norm
        for layer in range(len(self.sources)):
            prefix = f"model.layers.{layer}"
            normed, residual = self._norm(residual, branch, f"{prefix}.input_layernorm")
            branch = self._attention(normed, layer, f"{prefix}.self_attn")
            normed, residual = self._norm(residual, branch, f"{prefix}.post_attention_layernorm")
            branch = self._mlp(normed, f"{prefix}.mlp")
        hidden, _ = self._norm(residual, branch, "model.norm")
        if self.config["tie_word_embeddings"]:
            self._add_tied_head(hidden)
        else:
            self._product(hidden, _HEAD, "logits")

    def _embed(self) -> str:
        """The rows of the embedding that ``input_ids`` ask for, [b, s, h]."""
        if not self.is_int4:
            return self.graph.node("Gather", [self._weight(_EMBEDDING), "input_ids"], "embedded")
        codes, scales = quantize(float32(self.weights[_EMBEDDING]), 8)
        rows = codes.reshape(len(codes), -1)[:, : self.config["hidden_size"]]  # the last block may not be full
        inputs = [self.graph.packed(_EMBEDDING, rows), "input_ids", self.graph.weight(_scales(_EMBEDDING), scales)]
        how = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        return self.graph.node("GatherBlockQuantized", inputs, "embedded", domain=MICROSOFT, **how)

    def _add_tied_head(self, hidden: str) -> None:
        if not self.is_int4:
            self.graph.node("FusedMatMul", [hidden, _EMBEDDING], "logits", domain=MICROSOFT, transB=1)
            return
        shape = self.weights[_EMBEDDING].shape
        if shape[1] % BLOCK:
            codes = self.graph.packed(_HEAD, quantize(float32(self.weights[_EMBEDDING]), 8)[0])
        else:
            codes = self.graph.same_bytes(_HEAD, _EMBEDDING, [shape[0], shape[1] // BLOCK, BLOCK])
        self._multiply(hidden, codes, _scales(_EMBEDDING), shape, 8, "logits")

    def _add_constants(self) -> None:
        for name, table in zip(("cos_cache", "sin_cache"), rotary_tables(self.config)):
            self.graph.weight(name, table)
        self.graph.constant("zero", [0])
        self.graph.constant("one", [1])
        self.graph.constant("split_heads", [0, -1, self.width])
        self.graph.constant("join_queries", [0, -1, self.heads * self.width])
        self.graph.constant("join_keys", [0, -1, self.groups * self.width])

    def _lengths(self) -> tuple[str, str]:
        """GroupQueryAttention counts tokens itself: int32 [b] of t - 1, and int32 [] of the largest t."""
        lengths = self.graph.node("ReduceSum", ["attention_mask", "one"], "lengths", keepdims=0)
        last = self.graph.node("Cast", [self.graph.node("Sub", [lengths, "one"], "last")], "seqlens_k", to=6)
        shape = self.graph.node("Shape", ["attention_mask"], "mask_shape", start=1, end=2)
        longest = self.graph.node("Cast", [shape], "total_vector", to=6)
        return last, self.graph.node("Squeeze", [longest, "zero"], "total")

    def _add_empty_keys(self) -> None:
        """``empty`` [b, 0, groups * d]: what a sharing layer adds to its source's cache."""
        batch = self.graph.node("Shape", ["input_ids"], "batch", start=0, end=1)
        none = self.graph.constant("no_keys", [0, self.groups * self.width])
        shape = self.graph.node("Concat", [batch, none], "empty_shape", axis=0)
        self.graph.zeros(shape, "empty")

    def _attention(self, normed: str, layer: int, name: str) -> str:
        """[b, s, h] -> [b, s, h]"""
        source = self.sources[layer]
        query = self._linear(normed, f"{name}.q_proj")
        if self.qk_norm:
            query = self._head_norm(query, f"{name}.q_norm", "join_queries")
        outputs = [f"{name}/out"]
        if source == layer:
            key, value = (self._linear(normed, f"{name}.{part}_proj") for part in "kv")
            if self.qk_norm:
                key = self._head_norm(key, f"{name}.k_norm", "join_keys")
            past = cache_names("past_key_values", self.owners.index(layer))
            outputs += cache_names("present", self.owners.index(layer))
        else:
            key = value = "empty"
            past = cache_names("present", self.owners.index(source))
        attended = self.graph.node(
            "GroupQueryAttention",
            [query, key, value, *past, self.last, self.total, "cos_cache", "sin_cache"],
            outputs,
            domain=MICROSOFT,
            num_heads=self.heads,
            kv_num_heads=self.groups,
            scale=self.width**-0.5,
            do_rotary=1,
        )
        return self._linear(attended, f"{name}.o_proj")

    def _mlp(self, normed: str, name: str) -> str:
        """[b, s, h] -> [b, s, h]"""
        gate, up = (self._linear(normed, f"{name}.{part}_proj") for part in ("gate", "up"))
        sigmoid = self.graph.node("Sigmoid", [gate], f"{gate}/sigmoid")
        swish = self.graph.node("Mul", [gate, sigmoid], f"{gate}/silu")
        return self._linear(self.graph.node("Mul", [swish, up], f"{name}/product"), f"{name}.down_proj")

    def _norm(self, residual: str, branch: str | None, name: str) -> tuple[str, str]:
        """The normed sum of the two, and the sum."""
        scale, out = self._weight(f"{name}.weight"), f"{name}/out"
        if branch is None:
            return self.graph.node(_NORM, [residual, scale], out, axis=-1, epsilon=self.epsilon), residual
        outputs = [out, "", "", f"{name}/sum"]
        node, inputs = f"Skip{_NORM}", [residual, branch, scale]
        return self.graph.node(node, inputs, outputs, domain=MICROSOFT, epsilon=self.epsilon), outputs[-1]

    def _head_norm(self, states: str, name: str, joined: str) -> str:
        """RMS over each head: [b, s, heads * d] -> the same. ``joined``: the shape to come back to."""
        split = self.graph.node("Reshape", [states, "split_heads"], f"{name}/split")  # [b, s * heads, d]
        scale = self._weight(f"{name}.weight")
        normed = self.graph.node(_NORM, [split, scale], f"{name}/normed", axis=-1, epsilon=self.epsilon)
        return self.graph.node("Reshape", [normed, joined], f"{name}/out")

    def _linear(self, states: str, name: str) -> str:
        return self._product(states, f"{name}.weight", f"{name}/out")

    def _product(self, states: str, name: str, out: str) -> str:
        weight = float32(self.weights[name])  # [out, in]
        if not self.is_int4:
            return self.graph.node("MatMul", [states, self.graph.weight(name, weight.T)], out)
        bits = bits_of(name)
        codes, scales = quantize(weight, bits)
        kept = self.graph.packed(name, codes), self.graph.weight(_scales(name), scales)
        return self._multiply(states, *kept, weight.shape, bits, out)

    def _multiply(self, states: str, codes: str, scales: str, shape: tuple[int, ...], bits: int, out: str) -> str:
        """The product with a quantized weight of ``shape`` [out, in]."""
        # 1: in float32. 4 would round states to int8, which large activations do not survive (docs/engines.md).
        sizes = {"N": shape[0], "K": shape[1], "bits": bits, "block_size": BLOCK, "accuracy_level": 1}
        return self.graph.node("MatMulNBits", [states, codes, scales], out, domain=MICROSOFT, **sizes)

    def _weight(self, name: str) -> str:
        return self.graph.weight(name, float32(self.weights[name]))


def _scales(name: str) -> str:
    """What the scales of a quantized weight are called."""
    return f"{name}/scales"


def rotary_tables(config: dict[str, Any]) -> tuple[Array, Array]:
    """Cosines and sines, each float32 [max_position_embeddings, d/2], in the float32 steps that transformers takes.

    Raises:
        ValueError: the rotary positions are of another type.
    """
    rope, width = config["rope_parameters"], config["head_dim"]
    frequency = (1.0 / rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float32) / width)).astype(np.float32)
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)  # 0: stretched by the factor, 1: kept
        frequency = (frequency * kept + frequency / rope["factor"] * (1 - kept)).astype(np.float32)
    elif rope["rope_type"] != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not supported here: use 'default' or 'llama3'")
    angles = np.outer(np.arange(config["max_position_embeddings"], dtype=np.float32), frequency)
    return np.cos(angles), np.sin(angles)
