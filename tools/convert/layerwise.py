"""Log-probabilities of a checkpoint, one layer in memory at a time.

What is compared with an engine is the model that was trained, so these are the modules that train it. Whatever the
size of the model, this needs its embedding and one layer, in float64.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from skv_dist.checkpoint.frozen_model import config_of
from skv_dist.checkpoint.merged import read_weight
from skv_dist.config.run import RunConfig
from skv_dist.model.chunk import LiveKV, RoutedChunk
from skv_dist.model.rotary import RotaryTables
from skv_dist.parallel.processes import groups
from skv_dist.parallel.tensor_split import split_of
from skv_dist.routing import RoutePlan

from .blocks import Map
from .progress import Progress

LogProbs = npt.NDArray[np.float64]
Case = tuple[Map, torch.dtype]  # what is computed, and in what


@torch.no_grad()
def checkpoint_log_probs(
    checkpoint: Path, tokens: npt.NDArray[np.int64], cases: Collection[Case], stored: torch.dtype
) -> dict[Case, LogProbs]:
    """[1, s, V] of ``tokens`` [1, s], for each map and type of computation.

    Args:
        stored: the type that the weights are rounded to first, as an exported folder holds them.

    Raises:
        UserError: the checkpoint is damaged.
    """
    overrides = [f"data.sequence_length={tokens.shape[1]}", "train.precision=fp32", "train.recompute=none"]
    run = config_of(checkpoint, [*overrides, "model.make_vocab_size_divisible_by=1"])
    world = groups.start(run.parallel)
    try:
        return _run(checkpoint, run, torch.from_numpy(tokens).to(world.device), cases, stored)
    finally:
        groups.stop()


def _run(
    checkpoint: Path, run: RunConfig, tokens: torch.Tensor, cases: Collection[Case], stored: torch.dtype
) -> dict[Case, LogProbs]:
    # By the CPU, as for the engine: devices round cosines differently, which float64 would show.
    tables = RotaryTables(run.model, torch.float32, made_on="cpu")
    hidden: dict[Case, torch.Tensor | None] = dict.fromkeys(cases)
    live: dict[Case, LiveKV] = {case: {} for case in hidden}
    progress = Progress(f"{checkpoint}: run to compare", run.model.num_layers, "layers")
    for layer in range(run.model.num_layers):
        chunk = None  # the layer before goes first
        chunk = _chunk(checkpoint, run, layer, stored)
        chunk.rotary_tables = tables
        for dtype in dict.fromkeys(dtype for _, dtype in hidden):
            chunk.to(device=tokens.device, dtype=dtype)
            if chunk.has_head and not chunk.has_embedding and run.model.tie_embeddings:
                chunk.tied_weight = _read(checkpoint, run, "embedding.weight", stored).to(tokens.device, dtype)
            for case in hidden:
                if case[1] is dtype:
                    hidden[case], live[case] = chunk(RoutePlan(case[0]), tokens, hidden=hidden[case], live=live[case])
        progress.add(1)
    return {
        case: torch.log_softmax(logits.double(), -1).cpu().numpy()
        for case, logits in hidden.items()
        if logits is not None
    }


def _chunk(checkpoint: Path, run: RunConfig, layer: int, stored: torch.dtype) -> RoutedChunk:
    """One layer of the model, with its weights; the first with the embedding, the last with the head."""
    chunk = RoutedChunk(run, range(layer, layer + 1))
    chunk.eval()
    for name, parameter in chunk.named_parameters():
        full = _read(checkpoint, run, name, stored)
        parameter.copy_(split_of(name, run).take(full, 0, tuple(parameter.shape)))
    return chunk


def _read(checkpoint: Path, run: RunConfig, name: str, stored: torch.dtype) -> torch.Tensor:
    return read_weight(checkpoint, run, name).to(stored)
