"""The joint projection of queries, keys and values, which can leave keys and values out, and biases by projection."""

from functools import cache
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, linear_with_grad_accumulation_and_async_allreduce


class QkvLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear over QKV rows, which lie group by group: queries, key, value."""

    def forward(self, input_: torch.Tensor, *rest: Any, queries_only: tuple[int, int] | None = None) -> Any:
        """[s, b, h] -> ([s, b, rows], bias).

        Args:
            queries_only: (groups on this rank, queries of each) to project queries alone. The rows of keys and values
                then get a gradient of exact zeros, as they would if nobody read what they give.
        """
        if queries_only is None:
            return super().forward(input_, *rest)
        groups, queries = queries_only
        # [groups * (queries + 2) * d, h] -> [groups * queries * d, h]
        weight = self.weight.unflatten(0, (groups, queries + 2, -1))[:, :queries].flatten(0, 2)
        # As in Megatron's own forward; over one rank there is nothing to reduce or gather.
        bias = None if self.bias is None else self.bias.unflatten(0, (groups, queries + 2, -1))[:, :queries].flatten()
        out = linear_with_grad_accumulation_and_async_allreduce(
            input_, weight, bias, False, self.allreduce_dgrad, self.sequence_parallel, tp_group=self.tp_group
        )
        return out, None


@cache
def with_bias(linear: type) -> type:
    """Megatron's linear module with a bias, whatever its configuration says: that knows one answer for several."""

    class WithBias(linear):
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **{**given, "bias": True})

    return WithBias
