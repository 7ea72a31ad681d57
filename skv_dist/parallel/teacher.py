"""A teacher beside the model that learns: the same layout, the full route, no gradient (``distillation``)."""

from typing import NamedTuple

import torch

from skv_dist.data.batches import MicroBatch
from skv_dist.parallel.engines.frozen import FrozenEngine
from skv_dist.routing import RoutePlan


class Lesson(NamedTuple):
    """What the teacher's chunk gave, and what was left of the received tensor.

    Attributes:
        given: hidden state [s/t, b, h] for the teacher's next chunk; behind the last, this rank's logits [s, b, v].
        received: what the model's own chunk reads; None on the first.
    """

    given: torch.Tensor
    received: torch.Tensor | None


class Teacher:
    """Runs its chunks one micro-batch at a time, each just before the model's own.

    Between pipeline stages its hidden state travels in front of what the model sends, so that it needs no schedule of
    its own and never holds more micro-batches than the model does. Its columns come back with a gradient of zeros.

    Args:
        engine: the teacher's weights, in the layout of the model that learns.
        weight: how much of the objective is the distance to it.
    """

    def __init__(self, engine: FrozenEngine, weight: float) -> None:
        self.weight = weight
        self._engine = engine
        chunk = engine.model.routed_chunks()[0]
        self._full = RoutePlan(range(chunk.num_layers))
        self.columns: int = chunk.config.hidden_size
        """Columns that its hidden state takes on the wire."""

    @torch.no_grad()
    def run_chunk(self, index: int, batch: MicroBatch, received: torch.Tensor | None) -> Lesson:
        """Run chunk ``index`` on what `add_to` made on the stage before, [s/t, b, columns + ...]; None on the first."""
        hidden, rest = None, None
        if received is not None:
            hidden = received.detach()[..., : self.columns]
            with torch.enable_grad():
                rest = received[..., self.columns :]
        given = self._engine.forward(
            index, self._full, batch.tokens, None, batch.documents, hidden, None, None, None, gather=False
        )
        return Lesson(given, rest)

    def add_to(self, out: torch.Tensor, lesson: Lesson) -> torch.Tensor:
        """What the model sends to the next stage, [s/t, b, w], behind what the teacher does."""
        return torch.cat([lesson.given, out], dim=-1)

    def objective(self, losses: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy and divergence [2] -> what is minimized, a scalar."""
        return (1 - self.weight) * losses[0] + self.weight * losses[1]
