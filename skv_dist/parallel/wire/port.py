"""Where Megatron's schedules meet a chunk: they leave here what the stage before sent."""

from typing import Any

import torch
from megatron.core.enums import ModelType

from skv_dist.model.chunk import RoutedChunk


class ChunkPort(torch.nn.Module):
    """What the schedules ask of a model, for one chunk of this rank. A module, as they insist, without parameters.

    Args:
        index: which of its rank's chunks this is.
        num_chunks: chunks of this rank.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, chunk: RoutedChunk, index: int, num_chunks: int) -> None:
        super().__init__()
        self.config: Any = chunk.config
        self.index = index
        self.is_last: bool = chunk.has_head
        # Read by the interleaved schedule, which numbers the chunks of a rank.
        self.vp_stage = index if num_chunks > 1 else None
        self._received: torch.Tensor | None = None

    def set_input_tensor(self, received: list[torch.Tensor | None]) -> None:
        """Called by the schedules before each forward; None for the first stage."""
        (self._received,) = received

    def take_input(self) -> torch.Tensor | None:
        """What the stage before sent for the next forward, packed. Nothing is left behind, or it would stay in memory
        beyond its backward."""
        received, self._received = self._received, None
        return received
