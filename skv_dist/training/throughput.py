"""Speed and memory, as reported in the metrics."""

import resource
import sys

import torch

from skv_dist.config.run import RunConfig

# Dense bf16 peak in FLOP/s by part of the device's name, from NVIDIA's data sheets (without sparsity).
_PEAK = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


def flops_per_token(run: RunConfig) -> float:
    """Model FLOPs of forward and backward per token: 6 per matrix weight, plus attention, without recomputation.

    As in PaLM (Chowdhery et al., arXiv 2204.02311, appendix B), but of attention the causal half, which is what is
    computed. Keys and values that nobody reads count as if they were computed.
    """
    model = run.model
    width = model.kv_channels
    queries, keys = model.num_attention_heads * width, model.num_kv_heads * width
    attention = model.hidden_size * (queries + 2 * keys) + queries * model.hidden_size
    mlp = (3 if model.gated else 2) * model.hidden_size * model.ffn_hidden_size
    weights = model.num_layers * (attention + mlp) + run.vocab_size * model.hidden_size
    return 6.0 * weights + 6.0 * model.num_layers * queries * run.data.sequence_length


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device by its data sheet; None where unknown, so that no MFU is reported."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in _PEAK.items() if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest amount so far: allocated GPU memory, or on a CPU the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
