"""The order of samples: a stateless shuffle and a stateless blend.

Both are pure functions of (seed, position), so a run may resume at any sample on any number of replicas and workers,
and a new numpy or Python changes nothing. No permutation is ever stored.
"""

import hashlib
import struct
from collections.abc import Sequence
from functools import lru_cache

_MASK = (1 << 64) - 1
_BLEND_BLOCK = 4096  # weights are honoured exactly within each block of this many samples


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a fixed bijection that scrambles 64 bits."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


@lru_cache(maxsize=256)
def _round_keys(seed: int, stream: str, epoch: int) -> tuple[int, ...]:
    message = b"skv-dist/order/" + stream.encode() + struct.pack("<2q", seed, epoch)
    return struct.unpack("<6Q", hashlib.shake_256(message).digest(48))


def shuffled(index: int, size: int, seed: int, stream: str = "", epoch: int = 0) -> int:
    """Image of ``index`` under a pseudo-random permutation of range(size).

    A six-round Feistel network on the smallest even number of bits that holds ``size``, walked until it lands inside
    (format-preserving encryption by cycle walking, Black and Rogaway 2002): fewer than 4 walks on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _round_keys(seed, stream, epoch)
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        index = left << half | right
        if index < size:
            return index


@lru_cache(maxsize=8)
def _quotas(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Whole samples of each source per block, by largest remainder, at least one each."""
    weight_sum = sum(weights)
    exact = [weight / weight_sum * _BLEND_BLOCK for weight in weights]
    quotas = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (quotas[i] - exact[i], i))
    for position in range(_BLEND_BLOCK - sum(quotas)):
        quotas[by_remainder[position % len(weights)]] += 1
    while sum(quotas) > _BLEND_BLOCK:  # many tiny weights were rounded up to one
        quotas[max(range(len(quotas)), key=quotas.__getitem__)] -= 1
    return tuple(quotas)


@lru_cache(maxsize=64)
def _block(weights: tuple[float, ...], seed: int, block: int) -> tuple[tuple[int, int], ...]:
    """(source, index within this block's samples of that source) for each place in a block."""
    labels = [source for source, quota in enumerate(_quotas(weights)) for _ in range(quota)]
    order = [labels[shuffled(i, _BLEND_BLOCK, seed, "blend", block)] for i in range(_BLEND_BLOCK)]
    used = [0] * len(weights)
    places = []
    for source in order:
        places.append((source, used[source]))
        used[source] += 1
    return tuple(places)


def blended(index: int, weights: Sequence[float], seed: int) -> tuple[int, int]:
    """(source, position in that source's own order) of the ``index``-th sample of a blend."""
    if len(weights) == 1:
        return 0, index
    key = tuple(weights)
    block, place = divmod(index, _BLEND_BLOCK)
    source, within = _block(key, seed, block)[place]
    return source, block * _quotas(key)[source] + within


def num_blended(index: int, weights: Sequence[float], seed: int) -> list[int]:
    """How many of the samples before the ``index``-th of a blend come from each source."""
    if len(weights) == 1:
        return [index]
    key = tuple(weights)
    block, place = divmod(index, _BLEND_BLOCK)
    counts = [block * quota for quota in _quotas(key)]
    for source, _ in _block(key, seed, block)[:place]:
        counts[source] += 1
    return counts
