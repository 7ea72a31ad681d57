"""With routing.policy none the model is transformers' Qwen3 or Llama, weight by weight."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests import jobs

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": jobs.VOCAB, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
ROPE3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def to_ours(state: dict[str, torch.Tensor], groups: int, width: int, tied: bool) -> dict[str, np.ndarray]:
    ours = {"embedding.weight": state["model.embed_tokens.weight"], "final_norm.weight": state["model.norm.weight"]}
    if not tied:
        ours["output_layer.weight"] = state["lm_head.weight"]
    for layer in range(SHAPE["num_hidden_layers"]):
        theirs, mine = f"model.layers.{layer}.", f"layers.{layer}."
        q, k, v = (state[f"{theirs}self_attn.{x}_proj.weight"] for x in "qkv")
        parts = [x.view(groups, -1, width, x.shape[1]) for x in (q, k, v)]
        ours[mine + "self_attention.linear_qkv.weight"] = torch.cat(parts, dim=1).flatten(0, 2)
        ours[mine + "self_attention.linear_proj.weight"] = state[theirs + "self_attn.o_proj.weight"]
        for x in "qk":
            if f"{theirs}self_attn.{x}_norm.weight" in state:
                ours[f"{mine}self_attention.{x}_layernorm.weight"] = state[f"{theirs}self_attn.{x}_norm.weight"]
        ours[mine + "mlp.linear_fc1.weight"] = torch.cat(
            [state[theirs + "mlp.gate_proj.weight"], state[theirs + "mlp.up_proj.weight"]]
        )
        ours[mine + "mlp.linear_fc2.weight"] = state[theirs + "mlp.down_proj.weight"]
        ours[mine + "input_layernorm.weight"] = state[theirs + "input_layernorm.weight"]
        ours[mine + "pre_mlp_layernorm.weight"] = state[theirs + "post_attention_layernorm.weight"]
    return {name: tensor.detach().numpy().copy() for name, tensor in ours.items()}


@pytest.mark.parametrize(
    ("kind", "tied", "scaled", "processes"),
    [("qwen3", True, False, 1), ("qwen3", False, False, 2), ("llama", False, True, 1), ("llama", True, True, 2)],
)
def test_logits_equal_transformers(workers: Any, kind: str, tied: bool, scaled: bool, processes: int) -> None:
    torch.manual_seed(0)
    width = 16 if kind == "qwen3" else 8  # Qwen3's heads are wider than hidden_size / heads
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if scaled:
        rope = {"rope_type": "llama3", "rope_theta": 10000.0, **ROPE3}
    classes = (Qwen3Config, Qwen3ForCausalLM) if kind == "qwen3" else (LlamaConfig, LlamaForCausalLM)
    config = classes[0](**SHAPE, head_dim=width, tie_word_embeddings=tied, rope_parameters=rope, rms_norm_eps=1e-6)
    model = classes[1](config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    tokens = torch.randint(0, jobs.VOCAB, (2, 48))
    with torch.no_grad():
        theirs = model(tokens).logits.numpy()

    settings = jobs.config(
        model={
            "num_layers": 4, "head_dim": width, "qk_norm": kind == "qwen3", "tie_embeddings": tied,
            "rope_scaling": ROPE3 if scaled else None,
        },
        data={"sequence_length": 48},
        parallel={"zero_stage": 0, "tensor": processes},
    )  # fmt: skip
    weights = to_ours(dict(model.state_dict()), 2, width, tied)
    ours = workers(processes)(jobs.logits, settings, weights, tokens.numpy(), [0, 1, 2, 3])[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    wrong = workers(processes)(jobs.logits, settings, weights, tokens.numpy(), [0, 1, 1, 3])[0]
    assert np.abs(wrong - theirs).max() > 1e-2 * np.abs(theirs).max()
