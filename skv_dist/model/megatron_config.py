"""Our configuration in Megatron-core's terms."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from skv_dist.config.model import ModelConfig
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.model.attention import RoutedSelfAttention, SdpaCoreAttention
from skv_dist.model.layer import RoutedLayer
from skv_dist.model.norm import norm_class
from skv_dist.model.projection import QkvLinear, with_bias

_ACTIVATIONS = {"swiglu": F.silu, "geglu": functools.partial(F.gelu, approximate="tanh"), "gelu": F.gelu}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported (it needs a GPU)."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception:  # a wheel built for another CUDA raises more than ImportError
        return False
    return True


def transformer_impl(run: RunConfig) -> str:
    """``local`` or ``transformer_engine``. ``auto`` is the former everywhere: names of parameters depend on it.

    Raises:
        UserError: Transformer Engine is asked for and cannot be used.
    """
    asked = run.model.transformer_impl
    if asked == "transformer_engine" and not has_transformer_engine():
        raise UserError(
            "model.transformer_impl: transformer_engine, but Transformer Engine cannot be imported here: "
            "install it (it needs a GPU) or set model.transformer_impl=local"
        )
    return "local" if asked == "auto" else asked


def check_device(run: RunConfig) -> None:
    """Refuse to train where the device of this machine would leave out what the configuration asks for.

    Raises:
        UserError: naming both keys and the cure.
    """
    by_flex = {
        "data.reset_attention: true": run.data.reset_attention,
        f"model.sliding_window {run.model.sliding_window}": run.model.sliding_window is not None,
    }
    asked = [key for key, is_set in by_flex.items() if is_set]
    if torch.cuda.is_available() and asked and run.model.attention_dropout:
        raise UserError(
            f"{asked[0]} and model.attention_dropout {run.model.attention_dropout} do not work together on a GPU, "
            "whose kernel for attention within documents or windows knows no dropout: set "
            "model.attention_dropout=0 (and, to go on with an earlier run, name it in checkpoint.allow_changed)"
        )


def transformer_config(run: RunConfig) -> TransformerConfig:
    """Megatron's configuration of the layers of one rank."""
    model, parallel = run.model, run.parallel
    dtype = DTYPES[run.train.precision]
    on_gpu = torch.cuda.is_available()
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.kv_channels,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=model.gated,
        activation_func=_ACTIVATIONS[model.activation],
        add_bias_linear=False,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        # Weights are drawn by skv_dist.model.initialize, as a function of their global names.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        # The fused weight-gradient kernel is Apex's and writes into Megatron's own gradient buffers.
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        # The fused SwiGLU is compiled by Inductor, which wants a compiler on a CPU; it does not nest in ours.
        bias_activation_fusion=on_gpu and model.activation == "swiglu" and not run.train.compile,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        # Two stages with chunks would mix up their transfers without the overlap (docs/pitfalls.md); 1F1B refuses it.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        microbatch_group_size_per_vp_stage=parallel.pipeline,
    )
    # Read by the schedules. Set behind its checks, and the pipeline's size not at all: both would renumber our layers.
    config.virtual_pipeline_model_parallel_size = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    return config


def layer_spec(model: ModelConfig, impl: str) -> ModuleSpec:
    """Megatron's layer spec with our layer and attention in it; in the local spec also our core attention and norms."""
    if impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_norm)
    else:
        normalization = "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm"
        spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_norm, normalization=normalization)
    spec.module = RoutedLayer
    attention = spec.submodules.self_attention
    attention.module = RoutedSelfAttention
    if impl == "local":
        norm = norm_class(model)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        attention.submodules.core_attention = SdpaCoreAttention
        attention.submodules.linear_qkv = QkvLinear
        if model.qk_norm:
            attention.submodules.q_layernorm = attention.submodules.k_layernorm = norm
        _add_biases(attention.submodules, spec.submodules.mlp.submodules, model.biases)
    return spec


def _add_biases(attention: Any, mlp: Any, biases: Sequence[str]) -> None:
    """Give the linear modules of a spec the biases that ``model.biases`` names."""
    for bias, modules, names in (
        ("qkv", attention, ["linear_qkv"]),
        ("attention_output", attention, ["linear_proj"]),
        ("mlp", mlp, ["linear_fc1", "linear_fc2"]),
    ):
        for name in names if bias in biases else ():
            setattr(modules, name, with_bias(getattr(modules, name)))
