"""The routed transformer, composed from megatron-core's blocks.

Axes in shape comments: s sequence, b batch, h hidden, q query heads on this rank, k KV heads on this rank, d head
width, v vocabulary on this rank, t tensor-parallel size (with sequence parallelism, hidden states are [s/t, b, h]).
"""
