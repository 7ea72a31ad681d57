"""Skips updates that would harm the model, and gives up when there are too many."""

import math
import statistics
from collections import deque
from typing import Any

from skv_dist.config.train import TrainConfig
from skv_dist.errors import UserError


class Guard:
    """Judges each batch by its loss before the update.

    A loss is a spike when it exceeds ``train.spike_factor`` times the median of the last ``train.spike_window``
    accepted losses; there is no judgement before the window is full, while the loss still falls fast.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._accepted: deque[float] = deque(maxlen=config.spike_window)
        self.skipped = 0
        self._in_a_row = 0

    @property
    def limit(self) -> float:
        """The largest loss that is no spike; infinite while there is no judgement."""
        factor = self._config.spike_factor
        if factor is None or len(self._accepted) < self._config.spike_window:
            return math.inf
        return factor * self._usual

    @property
    def _usual(self) -> float:
        return statistics.median(self._accepted)

    def objection(self, loss: float) -> str | None:
        """Why the update should be skipped; None if it may be made: where ``loss`` is finite and within `limit`."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if loss > self.limit:
            return f"the loss {loss:.4g} is more than {self._config.spike_factor:g} times the usual {self._usual:.4g}"
        return None

    def record(self, step: int, loss: float, objection: str | None) -> None:
        """Note what became of a step.

        Raises:
            UserError: ``train.max_skipped_steps`` updates in a row were skipped.
        """
        if objection is None:
            self._in_a_row = 0
            self._accepted.append(loss)
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self._config.max_skipped_steps:
            raise UserError(
                f"step {step}: {objection}; {self._in_a_row} steps in a row were skipped "
                "(train.max_skipped_steps): lower optimizer.lr or look at the data"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the guard."""
        return {"accepted": list(self._accepted), "skipped": self.skipped, "in_a_row": self._in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        self._accepted.extend(state["accepted"])
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
