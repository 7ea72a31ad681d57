"""The folder that ONNX Runtime GenAI reads.

Its type is one of `DTYPES`, whatever the exported folder holds:

- float32: for processors, which compute in it.
- float16: half of the size, cache and logits too; for GPUs. The CPU provider computes in float32 and rounds between
  nodes.
- int4: projections are kept in blocks of 32 numbers of four bits, embedding and head in such of eight. All else is
  float32.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from ..exported_config import read_config, read_sampling, weight_shapes
from .decoder import add_decoder, cache_names
from .graph import MICROSOFT, Graph
from .weights import Array, map_weights

DTYPES = ("float32", "float16", "int4")
_HEAD_MULTIPLE = 16
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "min_length", "num_beams")
_NOT_COPIED = {"config.json", "generation_config.json", "model.safetensors.index.json"}  # all else is the tokenizer's


def export_onnx(folder: Path, out: Path, dtype: str = "float32") -> None:
    """Write into the folder ``out``: ``model.onnx``, its data file, ``genai_config.json`` and the tokenizer's files.

    One weight is in memory at a time.

    Args:
        dtype: one of `DTYPES`.

    Raises:
        ValueError: the folder cannot be expressed.
    """
    config, weights = check_expressible(folder)
    import onnx
    from onnx import TensorProto, helper

    with Graph(out, is_half=dtype == "float16") as graph:
        add_decoder(graph, config, weights, is_int4=dtype == "int4")
    number = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.FLOAT
    inputs, outputs = _inputs(config, number), _outputs(config, number)
    body = helper.make_graph(graph.nodes, "skv", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=10, producer_name="skv-dist")
    onnx.save(model, out / "model.onnx")
    sampling = read_sampling(folder)
    (out / "genai_config.json").write_text(json.dumps(_genai_config(config, sampling), indent=2) + "\n")
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja", ".model", ".txt") and path.name not in _NOT_COPIED:
            shutil.copy(path, out)


def check_expressible(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """``config.json`` and the weights, of which no bytes are read.

    Raises:
        ValueError: the folder cannot be read or expressed, or the package onnx is missing.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ValueError("writing an ONNX model needs the package onnx: pip install onnx") from error
    config = read_config(folder)
    read_sampling(folder)
    _check_type(config, folder)
    weights = map_weights(folder)
    _check(config, weights, folder)
    return config, weights


def _check_type(config: dict[str, Any], folder: Path) -> None:
    """Raises ValueError where the folder is no exported one of ours, or the runtime would refuse it."""
    if config.get("model_type") != "skv":
        raise ValueError(f"{folder} holds a {config.get('model_type')!r} model, not 'skv': use that model's converter")
    if config.get("block"):
        name, value = next(iter(config["block"].items()))
        raise ValueError(
            f"{folder}: block.{name} is {value!r}, which the ONNX graph written here does not carry: use transformers"
        )
    rope_type = config["rope_parameters"]["rope_type"]
    if rope_type not in ("default", "llama3"):
        raise ValueError(
            f"{folder}: rope_type is {rope_type!r}, but the ONNX graph written here carries 'default' and 'llama3' "
            "only: use transformers"
        )
    if config["head_dim"] % _HEAD_MULTIPLE:
        raise ValueError(
            f"{folder}: head_dim is {config['head_dim']}, but ONNX Runtime's GroupQueryAttention rotates heads whose "
            f"width is a multiple of {_HEAD_MULTIPLE} only: this model cannot run there"
        )


def _check(config: dict[str, Any], weights: dict[str, Array], folder: Path) -> None:
    """Refuse what cannot be expressed.

    Raises:
        ValueError: the map is said in another way, or weights that it needs are missing or of another shape.
    """
    if config.get("kv_retention") is not None:
        raise ValueError(f"{folder}/config.json sets kv_retention: set the kv_source_layers that it means instead")
    for name, shape in weight_shapes(config).items():
        if name not in weights:
            raise ValueError(f"{folder} holds no {name}, which its config.json needs")
        if weights[name].shape != shape:
            raise ValueError(f"{folder}: {name} is {list(weights[name].shape)}, but config.json makes it {list(shape)}")
    biased = [name for name in weights if name.endswith("proj.bias")]
    if biased:
        raise ValueError(f"{folder}: {biased[0]} is not supported here")


def _inputs(config: dict[str, Any], number: int) -> list[Any]:
    from onnx import TensorProto, helper

    tokens = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", "t"])
    return [tokens, mask, *_caches(config, number, "past_key_values", "past")]


def _outputs(config: dict[str, Any], number: int) -> list[Any]:
    from onnx import helper

    logits = helper.make_tensor_value_info("logits", number, ["b", "s", config["vocab_size"]])
    return [logits, *_caches(config, number, "present", "t")]


def _caches(config: dict[str, Any], number: int, prefix: str, length: str) -> list[Any]:
    """One key and one value for each owner, [b, groups, length, d].

    Args:
        number: their type, as onnx numbers it.
    """
    from onnx import helper

    shape = ["b", config["num_key_value_heads"], length, config["head_dim"]]
    names = [name for owner in range(_num_caches(config)) for name in cache_names(prefix, owner)]
    return [helper.make_tensor_value_info(name, number, shape) for name in names]


def _num_caches(config: dict[str, Any]) -> int:
    return len(set(config["kv_source_layers"]))


def _genai_config(config: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """What the runtime needs to know. ``num_hidden_layers`` is the number of caches that it allocates.

    Args:
        sampling: ``generation_config.json``.
    """
    ends = sampling.get("eos_token_id", config.get("eos_token_id"))
    end = ends[0] if isinstance(ends, list) else ends
    pad = config.get("pad_token_id")
    past = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    present = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": config["head_dim"],
        "hidden_size": config["hidden_size"],
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **past},
        "outputs": {"logits": "logits", **present},
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": _num_caches(config),
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
    search = {"do_sample": False, **{key: sampling[key] for key in _SAMPLING if sampling.get(key) is not None}}
    search |= {"max_length": config["max_position_embeddings"], "past_present_share_buffer": True}
    return {"model": {key: value for key, value in model.items() if value is not None}, "search": search}
