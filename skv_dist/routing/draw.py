"""Random numbers that are a pure function of where in the run they are used.

No generator object, no global state: SHAKE-256 over the position, so that the same table comes out on every
platform, Python version, rank and after every resume, and again when a layer is recomputed.
"""

import hashlib
import struct
from dataclasses import dataclass

_WORD = 1 << 64


@dataclass(frozen=True)
class DrawKey:
    """Position of one micro-batch in a run.

    ``micro_batch`` counts over the whole global batch of a step: ``local index * data-parallel size + data-parallel
    rank`` (see `skv_dist.data.batches`). It therefore holds both the micro-batch and the data-parallel rank, and a
    run that resumes on another number of replicas draws the same tables for the same samples.

    ``part`` tells apart tables that are drawn independently for one micro-batch (one a stage with
    ``routing.within_stage``).
    """

    seed: int
    step: int
    micro_batch: int
    part: int = 0


def words(key: DrawKey, purpose: bytes, count: int) -> tuple[int, ...]:
    """``count`` independent unsigned 64-bit integers for this position."""
    message = b"skv-dist/1/" + purpose + struct.pack("<3q", key.seed, key.step, key.micro_batch)
    if key.part:
        message += struct.pack("<q", key.part)
    return struct.unpack(f"<{count}Q", hashlib.shake_256(message).digest(8 * count))


def happens(word: int, probability: float) -> bool:
    """True with the given probability; exact at 0 and 1."""
    return word < probability * _WORD


def below(word: int, n: int) -> int:
    """An integer in [0, n), uniform up to n / 2**64."""
    return (word * n) >> 64
