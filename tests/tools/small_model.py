"""The shape of the exported models that tests of prompts build, in whatever engine; imports nothing of one."""

from typing import Any

LAYERS, VOCABULARY = 8, 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "qk_norm": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
