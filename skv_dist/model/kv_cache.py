"""The K/V of all positions so far, of the owners that one chunk reads: what decoding keeps between tokens."""

import torch

from skv_dist.errors import UserError
from skv_dist.model.attention import KV


class KvCache:
    """Cache of one chunk for sequences that begin at different places (prompts are padded at their left).

    Attributes:
        length: positions so far.

    Args:
        capacity: positions there is room for.
        begins: int64 [b], where each sequence begins; what is before is padding, which nobody attends to.
    """

    def __init__(self, capacity: int, begins: torch.Tensor) -> None:
        self.length = 0
        self._capacity = capacity
        self._begins = begins
        self._kept: dict[int, KV] = {}  # by owner, each [capacity, b, k, d]

    def extend(self, owner: int, new: KV) -> KV:
        """Add the K/V of the positions behind `length`, [n, b, k, d]; all so far, [length + n, b, k, d].

        Raises:
            UserError: there is no room for them.
        """
        end = self.length + new.key.shape[0]
        if end > self._capacity:
            raise UserError(f"a cache of {self._capacity} positions is full")
        if owner not in self._kept:
            shape = (self._capacity, *new.key.shape[1:])
            self._kept[owner] = KV(new.key.new_zeros(shape), new.value.new_zeros(shape))
        kept = self._kept[owner]
        kept.key[self.length : end] = new.key
        kept.value[self.length : end] = new.value
        return KV(kept.key[:end], kept.value[:end])

    def advance(self, positions: int) -> None:
        """Behind a forward over so many positions."""
        self.length += positions

    def mask(self, positions: int, window: int | None = None) -> torch.Tensor:
        """bool [b, 1, positions, length + positions]: what each of the next positions may attend to, of the last
        ``window`` positions if that is given.

        Padding attends to itself, as a softmax over nothing would be NaN.
        """
        end = self.length + positions
        queries = torch.arange(self.length, end, device=self._begins.device)
        keys = torch.arange(end, device=self._begins.device)
        is_text = keys[None, None, :] >= self._begins[:, None, None]
        allowed = (keys[None, None, :] <= queries[None, :, None]) & is_text
        if window is not None:
            allowed &= queries[None, :, None] - keys[None, None, :] < window
        return (allowed | (keys[None, None, :] == queries[None, :, None]))[:, None]

    def bytes_per_token(self) -> int:
        """Bytes that a position of one sequence takes in this chunk."""
        return sum(kv.key[0, 0].nbytes + kv.value[0, 0].nbytes for kv in self._kept.values())
