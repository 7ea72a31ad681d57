"""Shapes that the benchmarks have in common, as the ``model`` section of a run configuration would give them."""

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-1.7b": {
        "num_layers": 28,
        "hidden_size": 2048,
        "ffn_hidden_size": 6144,
        "num_attention_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "qk_norm": True,
        "rope_theta": 1e6,
        "tie_embeddings": True,
    },
    # Six of the 36 layers: with fp32 states the whole model needs more than one GPU holds.
    "qwen3-8b-layers": {
        "num_layers": 6,
        "hidden_size": 4096,
        "ffn_hidden_size": 12288,
        "num_attention_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "qk_norm": True,
        "rope_theta": 1e6,
        "tie_embeddings": False,
    },
    "qwen3-8b": {  # decoding only
        "num_layers": 36,
        "hidden_size": 4096,
        "ffn_hidden_size": 12288,
        "num_attention_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "qk_norm": True,
        "rope_theta": 1e6,
        "tie_embeddings": False,
    },
    # Without Llama-3's frequency scaling, which costs no time in a step.
    "llama-3.2-1b": {
        "num_layers": 16,
        "hidden_size": 2048,
        "ffn_hidden_size": 8192,
        "num_attention_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "qk_norm": False,
        "rope_theta": 5e5,
        "tie_embeddings": True,
    },
    "tiny": {  # for trying the commands on a CPU
        "num_layers": 8,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "qk_norm": True,
        "rope_theta": 1e4,
        "tie_embeddings": True,
    },
}
