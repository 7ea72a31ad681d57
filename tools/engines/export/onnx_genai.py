"""Exported folder -> a folder for ONNX Runtime GenAI (run with onnxruntime-genai 0.18), with one KV cache an owner.

The graph is written node by node. Layers that share get no ``past``/``present`` of their own: their
GroupQueryAttention takes empty keys and values, and as its past what the source's has just written. To the runtime
the model has as many layers as owners, so it allocates that many caches.

Weights are stored as float32, whatever the folder holds: the CPU provider has no other type for all of these nodes.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_DATA = "model.onnx.data"
_ALIGNMENT = 4096  # so that the runtime can map the file
_MICROSOFT = "com.microsoft"


def _weights(folder: Path) -> dict[str, Array]:
    """Every tensor of the folder as a map of its file: no bytes are read yet. bfloat16 comes as uint16."""
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    found: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        data = np.memmap(path, np.uint8, mode="r")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in kinds:
                raise ValueError(f"{path}: {name} is {entry['dtype']}; only {', '.join(kinds)} can be converted")
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            found[name] = data[start:end].view(kinds[entry["dtype"]]).reshape(entry["shape"])
    if not found:
        raise ValueError(f"{folder} holds no *.safetensors file")
    return found


def _float32(tensor: Array) -> Array:
    if tensor.dtype == np.uint16:  # bfloat16 is the upper half of a float32
        wide = tensor.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return tensor.astype(np.float32, copy=False)


def _rotary(config: dict[str, Any]) -> tuple[Array, Array]:
    """Cosines and sines, each float32 [max_position_embeddings, d/2], in the float32 steps that transformers takes."""
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


class _Graph:
    """Collects nodes, and initializers whose bytes go to the data file at once."""

    def __init__(self, data: Path) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._data = data.open("wb")

    def __enter__(self) -> "_Graph":
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    def node(self, kind: str, inputs: list[str], output: str | list[str], **attributes: Any) -> str:
        """Returns the name of the first output."""
        from onnx import helper

        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=f"{outputs[0]}/{kind}", **attributes))
        return outputs[0]

    def constant(self, name: str, values: list[int]) -> str:
        """A small int64 vector, kept in the graph."""
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def weight(self, name: str, tensor: Array) -> str:
        """float32, kept in the data file."""
        from onnx import TensorProto

        self._data.seek(-self._data.tell() % _ALIGNMENT, 1)
        offset, tensor = self._data.tell(), np.ascontiguousarray(tensor, np.float32)
        tensor.tofile(self._data)
        entry = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=tensor.shape)
        entry.data_location = TensorProto.EXTERNAL
        for key, value in (("location", _DATA), ("offset", offset), ("length", tensor.nbytes)):
            entry.external_data.add(key=key, value=str(value))
        self.initializers.append(entry)
        return name


def _caches(kind: str, owner: int) -> list[str]:
    return [f"{kind}.{owner}.key", f"{kind}.{owner}.value"]


def _build(graph: _Graph, config: dict[str, Any], weights: dict[str, Array]) -> None:
    """Axes: b sequences, s new tokens, t tokens so far, h hidden, d a head's width."""
    heads, groups, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    epsilon = config["rms_norm_eps"]
    sources: list[int] = config["kv_source_layers"]
    owners = sorted(set(sources))

    def linear(source: str, name: str) -> str:
        # transformers keeps [out, in], MatMul takes [in, out]
        weight = graph.weight(f"{name}.weight", _float32(weights[f"{name}.weight"]).T)
        return graph.node("MatMul", [source, weight], f"{name}/out")

    def scale(name: str) -> str:
        return graph.weight(f"{name}.weight", _float32(weights[f"{name}.weight"]))

    def head_norm(source: str, name: str, joined: str) -> str:
        """RMS over each head: [b, s, heads * d] -> the same. ``joined``: the shape to come back to."""
        split = graph.node("Reshape", [source, "split_heads"], f"{name}/split")
        normed = graph.node(
            "SimplifiedLayerNormalization", [split, scale(name)], f"{name}/normed", axis=-1, epsilon=epsilon
        )
        return graph.node("Reshape", [normed, joined], f"{name}/out")

    for name, table in zip(("cos_cache", "sin_cache"), _rotary(config)):
        graph.weight(name, table)
    graph.constant("zero", [0])
    graph.constant("one", [1])
    graph.constant("split_heads", [0, -1, width])
    graph.constant("join_queries", [0, -1, heads * width])
    graph.constant("join_keys", [0, -1, groups * width])

    # GroupQueryAttention counts tokens itself: int32 [b] of t - 1, and int32 [] of the largest t
    lengths = graph.node("ReduceSum", ["attention_mask", "one"], "lengths", keepdims=0)
    last = graph.node("Cast", [graph.node("Sub", [lengths, "one"], "last")], "seqlens_k", to=6)
    shape = graph.node("Shape", ["attention_mask"], "mask_shape", start=1, end=2)
    total = graph.node("Squeeze", [graph.node("Cast", [shape], "total_vector", to=6), "zero"], "total")
    if len(owners) < len(sources):  # [b, 0, groups * d]: what a sharing layer adds to its source's cache
        batch = graph.node("Shape", ["input_ids"], "batch", start=0, end=1)
        none = graph.constant("no_keys", [0, groups * width])
        graph.node("ConstantOfShape", [graph.node("Concat", [batch, none], "empty_shape", axis=0)], "empty")

    embedding = graph.weight("model.embed_tokens.weight", _float32(weights["model.embed_tokens.weight"]))
    residual = graph.node("Gather", [embedding, "input_ids"], "embedded")
    branch: str | None = None  # what is to be added to the residual before the next norm

    def norm(residual: str, branch: str | None, name: str) -> tuple[str, str]:
        """The normed sum of the two, and the sum."""
        kind, out = "SimplifiedLayerNormalization", f"{name}/out"
        if branch is None:
            return graph.node(kind, [residual, scale(name)], out, axis=-1, epsilon=epsilon), residual
        inputs, outputs = [residual, branch, scale(name)], [out, "", "", f"{name}/sum"]
        return graph.node(f"Skip{kind}", inputs, outputs, domain=_MICROSOFT, epsilon=epsilon), outputs[-1]

    for layer, source in enumerate(sources):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        normed, residual = norm(residual, branch, f"{prefix}.input_layernorm")
        query = linear(normed, f"{attention}.q_proj")
        if config["qk_norm"]:
            query = head_norm(query, f"{attention}.q_norm", "join_queries")
        outputs = [f"{attention}/out"]
        if source == layer:
            key, value = (linear(normed, f"{attention}.{part}_proj") for part in "kv")
            if config["qk_norm"]:
                key = head_norm(key, f"{attention}.k_norm", "join_keys")
            past = _caches("past_key_values", owners.index(layer))
            outputs += _caches("present", owners.index(layer))
        else:
            key = value = "empty"
            past = _caches("present", owners.index(source))
        attended = graph.node(
            "GroupQueryAttention",
            [query, key, value, *past, last, total, "cos_cache", "sin_cache"],
            outputs,
            domain=_MICROSOFT,
            num_heads=heads,
            kv_num_heads=groups,
            scale=width**-0.5,
            do_rotary=1,
        )
        branch = linear(attended, f"{attention}.o_proj")
        normed, residual = norm(residual, branch, f"{prefix}.post_attention_layernorm")
        gate, up = (linear(normed, f"{prefix}.mlp.{part}_proj") for part in ("gate", "up"))
        swish = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], f"{gate}/sigmoid")], f"{gate}/silu")
        branch = linear(graph.node("Mul", [swish, up], f"{prefix}.mlp/product"), f"{prefix}.mlp.down_proj")

    hidden, _ = norm(residual, branch, "model.norm")
    if config["tie_word_embeddings"]:
        graph.node("FusedMatMul", [hidden, embedding], "logits", domain=_MICROSOFT, transB=1)
    else:
        head = graph.weight("lm_head.weight", _float32(weights["lm_head.weight"]).T)
        graph.node("MatMul", [hidden, head], "logits")


def _check(config: dict[str, Any], weights: dict[str, Array], folder: Path) -> None:
    """Raises:
    ValueError: the folder is of another kind, its map is not one, or weights that the map needs are missing."""
    if config.get("model_type") != "skv":
        raise ValueError(f"{folder} holds a {config.get('model_type')!r} model, not 'skv': use that model's converter")
    sources = config["kv_source_layers"]
    if config.get("kv_retention") is not None:
        raise ValueError(f"{folder}/config.json sets kv_retention: set the kv_source_layers that it means instead")
    if len(sources) != config["num_hidden_layers"]:
        raise ValueError(f"kv_source_layers has {len(sources)} entries for {config['num_hidden_layers']} layers")
    for layer, source in enumerate(sources):
        if not 0 <= source <= layer or sources[source] != source:
            raise ValueError(f"kv_source_layers[{layer}] is {source}, which is no earlier owner of a cache")
        if f"model.layers.{source}.self_attn.k_proj.weight" not in weights:
            raise ValueError(f"layer {source} cannot own a cache: {folder} holds no key projection of it")
    biased = [name for name in weights if name.endswith("proj.bias")]
    if biased or config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder}: {biased[0] if biased else config['hidden_act']} is not supported here")


def _genai_config(config: dict[str, Any]) -> dict[str, Any]:
    """What the runtime needs to know. ``num_hidden_layers`` is the number of caches that it allocates."""
    ends = config.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) else ends
    pad = config.get("pad_token_id")
    cached = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    present = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": config["head_dim"],
        "hidden_size": config["hidden_size"],
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **cached},
        "outputs": {"logits": "logits", **present},
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": len(set(config["kv_source_layers"])),
        "num_key_value_heads": config["num_key_value_heads"],
    }
    model = {
        "bos_token_id": config.get("bos_token_id"),
        "context_length": config["max_position_embeddings"],
        "decoder": decoder,
        "eos_token_id": ends,
        "pad_token_id": end if pad is None else pad,
        "type": "qwen3" if config["qk_norm"] else "llama",
        "vocab_size": config["vocab_size"],
    }
    search = {"do_sample": False, "max_length": config["max_position_embeddings"], "past_present_share_buffer": True}
    return {"model": {key: value for key, value in model.items() if value is not None}, "search": search}


def _values(config: dict[str, Any]) -> Iterator[list[Any]]:
    """The graph's inputs, then its outputs."""
    from onnx import TensorProto, helper

    integer, real = TensorProto.INT64, TensorProto.FLOAT
    groups, width, owners = config["num_key_value_heads"], config["head_dim"], len(set(config["kv_source_layers"]))

    def caches(kind: str, length: str) -> list[Any]:
        shape = ["b", groups, length, width]
        return [helper.make_tensor_value_info(name, real, shape) for i in range(owners) for name in _caches(kind, i)]

    tokens = helper.make_tensor_value_info("input_ids", integer, ["b", "s"])
    mask = helper.make_tensor_value_info("attention_mask", integer, ["b", "t"])
    logits = helper.make_tensor_value_info("logits", real, ["b", "s", config["vocab_size"]])
    yield [tokens, mask, *caches("past_key_values", "past")]
    yield [logits, *caches("present", "t")]


def export_onnx(folder: Path, out: Path) -> None:
    """Write into the folder ``out``: ``model.onnx``, its data file, ``genai_config.json`` and the tokenizer's files.

    One weight is in memory at a time.

    Raises:
        ValueError: the folder cannot be expressed.
    """
    try:
        import onnx
        from onnx import helper
    except ImportError as error:
        raise ValueError("writing an ONNX model needs the package onnx: pip install onnx") from error

    config = json.loads((folder / "config.json").read_text())
    weights = _weights(folder)
    _check(config, weights, folder)
    with _Graph(out / _DATA) as graph:
        _build(graph, config, weights)
    inputs, outputs = _values(config)
    body = helper.make_graph(graph.nodes, "skv", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(_MICROSOFT, 1)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=10, producer_name="skv-dist")
    onnx.save(model, out / "model.onnx")
    (out / "genai_config.json").write_text(json.dumps(_genai_config(config), indent=2) + "\n")
    ours = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja", ".model", ".txt") and path.name not in ours:
            shutil.copy(path, out)
