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


def make(
    kind: str, tied: bool = False, scaled: bool = False, layers: int = LAYERS, width: int = 32, **options: Any
) -> Any:
    """A model of a family (``model_type``) with random weights, norms and biases included.

    Args:
        scaled: with Llama 3's rotary scaling.
        options: fields of its config.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {
        "vocab_size": 262,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16 if kind == "qwen3" else 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_parameters": LLAMA3 if scaled else {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    if kind == "mistral":
        sizes["sliding_window"] = None
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**sizes, **options})).eval()
    for name, parameter in made.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def make_with_outliers() -> Any:
    """A ``llama`` in whose residual stream two entries are thousands of times larger than the others, which the norms
    bring up again: float32 rounds away what the others say, as it does in trained models."""
    model, outliers = make("llama"), [5, 17]
    with torch.no_grad():
        for layer in model.model.layers[1:3]:
            layer.mlp.down_proj.weight[outliers] *= 3000
        for layer in model.model.layers[3:]:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                large = norm.weight * 500
                large[outliers] = norm.weight[outliers]
                norm.weight.copy_(large)
            if layer is not model.model.layers[-1]:
                layer.self_attn.q_proj.weight *= 8
                layer.self_attn.k_proj.weight *= 8
        model.model.norm.weight *= 10
        model.model.norm.weight[outliers] /= 100
    return model


def save(model: Any, folder: Path, shard: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def words_tokenizer() -> Any:
    """61 words and an end of turn, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{number}": number for number in range(3, 61)}, "<end>": 61}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    made.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{% endfor %}"
    return made
