"""What processes send to one another, seen where every library has to pass: the methods of a process group."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

# Versions of torch call them differently: `_allgather_base` has become `all_gather_single`.
_METHODS = [
    name for name in dir(dist.ProcessGroup) if re.search("gather|reduce|scatter|broadcast|to_?all|send|recv", name)
]


@dataclass
class Traffic:
    """Calls of collectives and transfers by this process.

    Attributes:
        calls: the names of the methods, in order.
        payloads: bytes of each call: those of its inputs or of its outputs, whichever are more.
    """

    calls: list[str] = field(default_factory=list)
    payloads: list[int] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(self.payloads)


@contextlib.contextmanager
def watched_traffic() -> Iterator[Traffic]:
    """Notes what this process does on any process group. Functions that libraries have kept are seen as well."""
    traffic = Traffic()
    with contextlib.ExitStack() as stack:
        for name in _METHODS:
            stack.enter_context(patch.object(dist.ProcessGroup, name, _noting(name, traffic)))
        yield traffic


def _noting(name: str, traffic: Traffic) -> Any:
    right = getattr(dist.ProcessGroup, name)

    def call(self: Any, *args: Any, **given: Any) -> Any:
        traffic.calls.append(name)
        traffic.payloads.append(max((_bytes_of(value) for value in (*args, *given.values())), default=0))
        return right(self, *args, **given)

    return call


def _bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_of, value)) if isinstance(value, list | tuple) else 0
