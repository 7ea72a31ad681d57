"""Megatron-core on a CPU with gloo. Applied only where no CUDA device exists; on a GPU nothing is patched.

Each patch stands with its reason; docs/pitfalls.md says more of Megatron-core on a CPU.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_applied = False


def install() -> None:
    """Apply the patches once. Does nothing where CUDA is available."""
    global _applied
    if _applied or torch.cuda.is_available():
        return
    _applied = True

    # Buffers of the tensor-parallel mappings, p2p transfers and rotary tables are made on the "current device".
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    # Called around p2p transfers and by timers.
    torch.cuda.synchronize = lambda *args, **kwargs: None

    # The pipeline schedules count tokens in torch.zeros(..., device="cuda").
    zeros = torch.zeros

    def zeros_on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return zeros(*args, **kwargs)

    torch.zeros = zeros_on_cpu

    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
        """Named RNG streams over the CPU generator instead of the CUDA one."""

        def add(self, name: str, seed: int) -> None:
            before = torch.get_rng_state()
            torch.manual_seed(seed)
            self._is_initialized = True
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            before = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(before)

    tracker = CpuRngTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER = tracker
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    # Recompute saves and restores (CPU, CUDA, tracker) states; there is no CUDA state here.
    megatron_random._get_all_rng_states = lambda: (torch.get_rng_state(), None, tracker.get_states())

    def set_all_rng_states(cpu_state: torch.Tensor, _: object, tracker_states: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(cpu_state)
        tracker.set_states(tracker_states)

    megatron_random._set_all_rng_states = set_all_rng_states
