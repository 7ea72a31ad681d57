"""Small random models made by transformers itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LAYERS = 8
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

Call = Callable[..., int]  # runs skv-convert


def make(kind: str, tied: bool = False, scaled: bool = False, layers: int = LAYERS) -> Any:
    """A ``llama``, ``qwen3`` or ``mistral`` with random weights, norms included."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[kind]
    more: dict[str, Any] = {"sliding_window": None} if kind == "mistral" else {}
    torch.manual_seed(0)
    made = model(
        config(
            vocab_size=262,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16 if kind == "qwen3" else 8,
            max_position_embeddings=128,
            initializer_range=0.2,
            tie_word_embeddings=tied,
            rms_norm_eps=1e-6,
            rope_parameters=LLAMA3 if scaled else {"rope_type": "default", "rope_theta": 10000.0},
            **more,
        )
    ).eval()
    for name, parameter in made.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return made


def save(model: Any, folder: Path, shard: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder
