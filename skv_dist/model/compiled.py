"""Compiling the layers of a chunk (``train.compile``)."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import get_tensor_model_parallel_group_if_none

from skv_dist.config.model import ModelConfig
from skv_dist.model.norm import AllHeadsNorm


def compile_layers(layers: Sequence[Any], model: ModelConfig, tp_size: int) -> None:
    """Compile each `RoutedLayer` on its own: the graph of a step changes with every route table, a layer's does not.

    Args:
        tp_size: tensor-parallel ranks.
    """
    # Megatron warns of a deprecated argument inside its own row-parallel linear, which would cut the graph.
    # What the function returns never changes.
    torch.compiler.assume_constant_result(get_tensor_model_parallel_group_if_none)
    # One variant each: own K/V, borrowed on this stage, or from another; lent or not; training, in a region to be
    # recomputed, or evaluating. Another route table needs no other variants.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for layer in layers:
        if tp_size > 1:
            _keep_collectives_eager(layer, model, tp_size)
        layer.compiled_swiglu = model.activation == "swiglu"
        layer.forward = torch.compile(layer.forward, dynamic=False)


def _keep_collectives_eager(layer: Any, model: ModelConfig, tp_size: int) -> None:
    """Leave to Megatron what talks to other ranks: it waits for its collectives by handles, which the compiler does not
    follow. Traced, they give wrong gradients without an error (torch 2.11) or fail (2.13).
    """
    for module in layer.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | AllHeadsNorm):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    if model.num_kv_heads < tp_size:  # projections are gathered before they are split into heads
        attention = layer.self_attention
        attention.get_query_key_value_tensors = torch.compiler.disable(attention.get_query_key_value_tensors)
