"""What a set of layers must be like, whatever it costs."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from skv_dist.errors import UserError
from skv_dist.routing import map_from_cached_layers
from skv_dist.routing.kinds import Kinds, layers_by_kind


@dataclass(frozen=True)
class Constraints:
    """Attributes:
    num_layers: of the model.
    keep: layers that must keep their cache; the first of each kind in each stage is among them.
    apart: largest number of layers that use one cache, its owner included.
    stages: number of equal pipeline stages, which no map may cross.
    kinds: of the layers; None where they are of one kind.
    """

    num_layers: int
    keep: frozenset[int]
    apart: int
    stages: int = 1
    kinds: Kinds | None = None

    @classmethod
    def of(
        cls,
        num_layers: int,
        keep: Iterable[int] = (),
        apart: int | None = None,
        stages: int = 1,
        kinds: Kinds | None = None,
    ) -> "Constraints":
        """Args:
            keep: layers that must keep their cache whatever else is asked for.

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
        size = num_layers // stages
        for begin in range(0, num_layers, size):
            kept |= {of_kind[0] for of_kind in layers_by_kind(range(begin, begin + size), kinds)}
        return cls(num_layers, frozenset(kept), num_layers if apart is None else apart, stages, kinds)

    @property
    def smallest(self) -> int:
        """How many layers the smallest set has that is allowed."""
        number = 0
        for of_kind in layers_by_kind(range(self.num_layers), self.kinds):
            ends = [*(place for place, layer in enumerate(of_kind) if layer in self.keep), len(of_kind)]
            number += sum(-(-(end - begin) // self.apart) for begin, end in zip(ends, ends[1:]))
        return number

    def allow(self, layers: Iterable[int]) -> bool:
        """Whether these layers may keep their cache, and the others use those by the deployment rule."""
        owners = set(layers)
        return self.keep <= owners and self.allow_map(map_from_cached_layers(self.num_layers, owners, self.kinds))

    def allow_map(self, table: Sequence[int]) -> bool:
        size = self.num_layers // self.stages
        crosses = any(layer // size != source // size for layer, source in enumerate(table))
        users = Counter(table)
        return not crosses and self.keep <= users.keys() and max(users.values()) <= self.apart
