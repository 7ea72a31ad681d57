"""What a set of layers must be like, whatever it costs."""

from collections.abc import Iterable
from dataclasses import dataclass

from skv_dist.errors import UserError


@dataclass(frozen=True)
class Constraints:
    """Attributes:
    num_layers: of the model.
    keep: layers that must keep their cache; layer 0 is among them.
    apart: largest number of layers from one that keeps its cache to the next, or to the end.
    """

    num_layers: int
    keep: frozenset[int]
    apart: int

    @classmethod
    def of(cls, num_layers: int, keep: Iterable[int] = (), apart: int | None = None, stages: int = 1) -> "Constraints":
        """Args:
            stages: equal pipeline stages which no map may cross: the first layer of each keeps its cache.

        Raises:
            UserError: a layer does not exist, or the stages are not equal.
        """
        kept = {0, *keep}
        if outside := [layer for layer in kept if not 0 <= layer < num_layers]:
            raise UserError(f"--keep names layer {outside[0]}, but the model has layers 0..{num_layers - 1}")
        if stages < 1 or num_layers % stages:
            raise UserError(f"--stages {stages} does not divide the {num_layers} layers of the model")
        if apart is not None and apart < 1:
            raise UserError(f"--apart must be at least 1, got {apart}")
        kept |= set(range(0, num_layers, num_layers // stages))
        return cls(num_layers, frozenset(kept), num_layers if apart is None else apart)

    @property
    def smallest(self) -> int:
        """How many layers the smallest set has that is allowed."""
        ends = [*sorted(self.keep), self.num_layers]
        return sum(-(-(end - begin) // self.apart) for begin, end in zip(ends, ends[1:]))

    def allow(self, layers: Iterable[int]) -> bool:
        ordered = sorted(layers)
        gaps = (end - begin for begin, end in zip(ordered, [*ordered[1:], self.num_layers]))
        return self.keep <= set(ordered) and all(gap <= self.apart for gap in gaps)
