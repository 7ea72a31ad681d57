"""The small configuration that tests start from, and its sizes."""

from pathlib import Path
from typing import Any

VOCAB = 101  # odd on purpose: padded differently for each tensor-parallel size
VOCAB_OF_BYTES = 259
SEQUENCE = 16
GLOBAL_BATCH = 8

BASE: dict[str, Any] = {
    "model": {
        "num_layers": 8,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "qk_norm": True,
        "make_vocab_size_divisible_by": 8,
        "transformer_impl": "local",
        "vocab_size": VOCAB,
    },
    "routing": {"policy": "r_cla", "cross_prob": 0.6},
    "data": {"sequence_length": SEQUENCE, "sources": [{"path": "unused", "format": "text"}]},
    "train": {
        "steps": 3,
        "output_dir": "unused",
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": 2,
        "precision": "fp32",
        "seed": 7,
    },
    "optimizer": {"lr": 1e-2, "eps": 1e-4, "clip_grad_norm": 0.5, "weight_decay": 0.1},
}


def config(**sections: dict[str, Any]) -> dict[str, Any]:
    """BASE with keys of some sections replaced: a model on tokens that the test makes itself."""
    return {name: {**BASE.get(name, {}), **sections.get(name, {})} for name in {**BASE, **sections}}


def run_settings(text: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A whole run of six steps on a folder of text, into ``out``; the vocabulary is that of its tokenizer, bytes."""
    given = config(**sections)
    given["model"] = {**given["model"], "vocab_size": None, **sections.get("model", {})}
    given["data"] = {
        "sequence_length": SEQUENCE,
        "sources": [{"path": str(text / "*.txt"), "format": "text"}],
        "validation_fraction": 0.2,
        "cache_dir": str(text / "cache"),
        **sections.get("data", {}),
    }
    given["train"] = {**given["train"], "steps": 6, "output_dir": str(out), "progress": False}
    given["train"].update(sections.get("train", {}))
    given["eval"] = {"every": 3, "samples": 7, "retention": [1.0, 0.5], **sections.get("eval", {})}
    return given
