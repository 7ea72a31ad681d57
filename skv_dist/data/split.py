"""Which documents are held out, and under which names and seeds samples are shuffled.

Both follow from what the data says, not from where it lies: a document is held out by a hash of its text and
``data.split_seed``. So it is the same one at another mount, for another ``train.seed`` or tokenizer, streamed or
prepared, and copies of a document stand on one side. Checkpoints written before this rule go on under the old one
(`SplitRule.PATH`), as another split would train on what was held out.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from skv_dist.config.data import DataConfig
from skv_dist.data.mapped_tokens import MappedTokens
from skv_dist.errors import UserError

_CHUNK = 1 << 20  # documents looked at together: bounds what the start of a run needs of memory


class SplitRule(StrEnum):
    """What decides on order and held-out text; kept in a checkpoint's state."""

    CONTENT = "content"
    PATH = "path"  # by the path of the source as written, train.seed and the document's number


def rule_of(state: dict[str, Any], config: DataConfig, allow_changed: Sequence[str] = ()) -> SplitRule:
    """The rule under which a checkpoint with this ``state.json`` was trained, and goes on.

    Raises:
        UserError: it streamed under the old rule, which is not there any more.
    """
    name = state.get("data", {}).get("rule", SplitRule.PATH)
    if name not in list(SplitRule):
        raise UserError(f"the checkpoint orders its data by the rule '{name}', which this version does not know")
    if name == SplitRule.CONTENT or "data.split_seed" in allow_changed:
        return SplitRule.CONTENT
    if config.streaming:
        raise UserError(
            "the checkpoint streamed its data in the order of an earlier version, which this one cannot repeat: set "
            "checkpoint.allow_changed=[data.split_seed] to go on in a new order and with other held-out text, or "
            "begin a new run with its weights by checkpoint.init_from"
        )
    return SplitRule.PATH


def is_held_out(hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [n]: which of the documents (or windows) with these hashes (uint64 [n]) are held out."""
    chosen = np.zeros(len(hashes), dtype=bool)
    if fraction <= 0:
        return chosen
    message = b"skv-dist/held-out/" + struct.pack("<q", seed)
    key = np.uint64(int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little"))
    threshold = np.uint64(int(fraction * 2**64))
    for begin in range(0, len(hashes), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        chosen[part] = _mix(np.asarray(hashes[part], dtype=np.uint64) ^ key) < threshold
    return chosen


def _mix(values: np.ndarray) -> np.ndarray:
    """As `skv_dist.data.order._mix`, of many values; products wrap around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _numbered(size: int, content: str) -> np.ndarray:
    """uint64 [size]: hashes of the numbers of documents (or windows) of a set that is called ``content``."""
    key = np.uint64(int(content[:16], 16))
    return _mix(np.arange(size, dtype=np.uint64) + key)


@dataclass(frozen=True)
class SourceOrder:
    """How one source is split and shuffled.

    Attributes:
        path: of the source as written, for messages and for the old rule.
        content: what tells this source's data from another's (`MappedTokens.content`).
        repetition: 0, or how many sources before this one hold the same data: they are shuffled apart.
        seed: ``train.seed``.
        split_seed: ``data.split_seed``.
    """

    rule: SplitRule
    path: str
    content: str
    repetition: int
    seed: int
    split_seed: int

    def train_stream(self) -> tuple[int, str]:
        """Seed and name under which training samples are shuffled."""
        return self.seed, self._name()

    def validation_stream(self) -> tuple[int, str]:
        """Seed and name under which held-out samples are shuffled: runs with other seeds evaluate on the same."""
        seed = self.seed if self.rule == SplitRule.PATH else self.split_seed
        return seed, self._name() + "/validation"

    def held_out_documents(self, prepared: MappedTokens, fraction: float) -> np.ndarray:
        """bool [documents]"""
        if self.rule == SplitRule.PATH:
            return _held_out_by_path(prepared.num_documents, fraction, self.seed, self.path)
        hashes = prepared.hashes
        if hashes is None:  # the text is not known any more
            hashes = _numbered(prepared.num_documents, self.content)
        return is_held_out(hashes, fraction, self.split_seed)

    def held_out_windows(self, num_windows: int, fraction: float) -> np.ndarray:
        """bool [windows]"""
        if self.rule == SplitRule.PATH:
            return _held_out_by_path(num_windows, fraction, self.seed, self.path)
        return is_held_out(_numbered(num_windows, self.content), fraction, self.split_seed)

    def _name(self) -> str:
        if self.rule == SplitRule.PATH:
            return self.path
        return f"content/{self.content}" + (f"/{self.repetition}" if self.repetition else "")


def source_orders(
    rule: SplitRule, paths: Sequence[str], contents: Sequence[str], seed: int, split_seed: int
) -> list[SourceOrder]:
    """One for each source."""
    seen: Counter[str] = Counter()
    orders = []
    for path, content in zip(paths, contents):
        orders.append(SourceOrder(rule, path, content, seen[content], seed, split_seed))
        seen[content] += 1
    return orders


def _held_out_by_path(size: int, fraction: float, seed: int, path: str) -> np.ndarray:
    """bool [size] by `SplitRule.PATH`, one by one."""
    if fraction <= 0:
        return np.zeros(size, dtype=bool)
    threshold, prefix = fraction * 2**64, b"skv-dist/split/" + path.encode()
    digests = (hashlib.blake2b(prefix + struct.pack("<2q", seed, number), digest_size=8) for number in range(size))
    return np.fromiter((int.from_bytes(d.digest(), "little") < threshold for d in digests), dtype=bool, count=size)
