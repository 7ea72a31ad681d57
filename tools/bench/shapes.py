"""Shapes that the benchmarks have in common: those of ``configs/models``, whole or cut down."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from skv_dist.config.model import ModelConfig
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError

_FOLDER = Path("configs", "models")

# name: (file of configs/models, what is changed)
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-1.7b": ("qwen3-1.7b", {}),
    "qwen3-8b": ("qwen3-8b", {}),
    # Six of the 36 layers: with fp32 states the whole model needs more than one GPU holds.
    "qwen3-8b-layers": ("qwen3-8b", {"num_layers": 6}),
    # Without Llama-3's frequency scaling, which the peers are not given either. It costs no time in a step.
    "llama-3.2-1b": ("llama-3.2-1b", {"rope_scaling": None}),
    "small": (  # whose prefill a processor is busy with for a second
        "qwen3-0.6b",
        {
            "num_layers": 16,
            "hidden_size": 256,
            "ffn_hidden_size": 768,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 64,
            "vocab_size": 4096,
        },
    ),
    "tiny": (  # for trying the commands on a CPU
        "qwen3-0.6b",
        {
            "num_layers": 8,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "vocab_size": 512,
            "rope_theta": 1e4,
        },
    ),
}
SHAPES = tuple(_SHAPES)


def read_shape(name: str) -> ModelConfig:
    """The ``model`` section of the shape ``name``, one of `SHAPES`.

    Raises:
        UserError: this is no source checkout, so that there is no ``configs/models``.
    """
    file, changes = _SHAPES[name]
    section = yaml.safe_load((_folder() / f"{file}.yaml").read_text(encoding="utf-8"))["model"]
    return ModelConfig.model_validate({**section, **changes})


def run_config(
    shape: ModelConfig,
    sequence_length: int,
    train: Mapping[str, Any],
    policy: str = "none",
    parallel: Mapping[str, Any] | None = None,
) -> RunConfig:
    """A run on random tokens: nothing is read and nothing written.

    Args:
        train: the ``train`` section but for ``output_dir`` and ``precision``, which is bf16.
        policy: of ``routing``.
        parallel: that section; without it ZeRO 0.
    """
    return RunConfig.model_validate(
        {
            "model": shape.model_copy(update={"max_position_embeddings": sequence_length}),
            "routing": {"policy": policy},
            "data": {
                "sequence_length": sequence_length,
                "sources": [{"path": "none", "format": "text"}],
                "validation_fraction": 0.0,
            },
            "parallel": parallel or {"zero_stage": 0},
            "train": {"output_dir": "unused", "precision": "bf16", **train},
            "optimizer": {"lr": 1e-4, "schedule": "constant"},
            "eval": {"every": 0},
        }
    )


def with_vocabulary(run: RunConfig) -> RunConfig:
    """The complete configuration. The tokenizer is asked only where the shape does not give the size."""
    from skv_dist.data.tokenizer import load_tokenizer

    return run if run.model.vocab_size else run.for_vocabulary(load_tokenizer(run.data.tokenizer).vocab_size)


def _folder() -> Path:
    """``configs/models`` of the checkout that this file is part of, or else of the working folder."""
    for checkout in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (checkout / _FOLDER).is_dir():
            return checkout / _FOLDER
    raise UserError(
        f"there is no {_FOLDER}, from which benchmarks take their shapes and which is not installed with skv-dist: "
        "run this in a source checkout"
    )
