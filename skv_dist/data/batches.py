"""Which samples each replica trains on, step by step."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from skv_dist.data.packing import Sample

T = TypeVar("T")


class Samples(Protocol):
    """An endless sequence of samples."""

    def __getitem__(self, position: int) -> Sample: ...


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads.

    Attributes:
        index: number of this micro-batch within the global batch of its step (see `DrawKey`).
        tokens: int64 [b, s].
        labels: int64 [b, s], the token after each.
        loss_mask: float32 [b, s], 1 where the prediction counts.
        documents: int64 [b, s] where attention stops at document boundaries, else None.
        sources: int64 [b], `Sample.source` of each.
    """

    index: int
    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    documents: torch.Tensor | None
    sources: torch.Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """On ``device``; from pinned memory without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """In page-locked memory, from which a GPU copies by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        documents = None if self.documents is None else change(self.documents)
        tokens, labels, loss_mask = change(self.tokens), change(self.labels), change(self.loss_mask)
        return MicroBatch(self.index, tokens, labels, loss_mask, documents, change(self.sources))


def collate(index: int, samples: Sequence[Sample], reset_attention: bool) -> MicroBatch:
    """Samples to one micro-batch. With ``reset_attention`` the prediction across a boundary does not count."""
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    documents = torch.from_numpy(np.stack([sample.documents for sample in samples]))
    all_count = np.ones(tokens.shape[1], dtype=bool)
    counts = np.stack([all_count if sample.counts is None else sample.counts for sample in samples])
    mask = torch.from_numpy(counts[:, 1:])  # the prediction of a token stands one place before it
    if reset_attention:
        mask = mask & (documents[:, :-1] == documents[:, 1:])
    return MicroBatch(
        index=index,
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=mask.float(),
        documents=documents[:, :-1].contiguous() if reset_attention else None,
        sources=torch.tensor([sample.source for sample in samples]),
    )


def micro_batches(
    samples: Samples,
    first_sample: int,
    num_micro_batches: int,
    micro_batch_size: int,
    replica: int,
    replicas: int,
    reset_attention: bool,
) -> list[MicroBatch]:
    """This replica's share of one global batch that begins at sample ``first_sample``.

    Micro-batch g of the global batch holds samples first + [g * b, (g + 1) * b). Local micro-batch m of replica r
    is g = m * replicas + r, so that what a micro-batch holds does not depend on the number of replicas.
    """
    batches = []
    for index in micro_batch_numbers(num_micro_batches, replica, replicas):
        begin = first_sample + index * micro_batch_size
        chosen = [samples[begin + i] for i in range(micro_batch_size)]
        batches.append(collate(index, chosen, reset_attention))
    return batches


def micro_batch_numbers(num_micro_batches: int, replica: int, replicas: int) -> list[int]:
    """Numbers within the global batch of a replica's micro-batches."""
    return [local * replicas + replica for local in range(num_micro_batches)]


def packed(batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Micro-batches of one shape as one tensor, int32 [planes, n, b, s + 1]: tokens, mask, and documents if any.

    The last column of the mask, which has no prediction, holds the sources.
    """
    tokens = torch.stack([torch.cat([batch.tokens, batch.labels[:, -1:]], dim=1) for batch in batches])
    planes = torch.zeros(3 if batches[0].documents is not None else 2, *tokens.shape, dtype=torch.int32)
    planes[0] = tokens
    for number, batch in enumerate(batches):
        planes[1, number, :, :-1] = batch.loss_mask
        planes[1, number, :, -1] = batch.sources
        if batch.documents is not None:
            planes[2, number, :, :-1] = batch.documents
    return planes


def unpacked(planes: torch.Tensor, numbers: Sequence[int]) -> list[MicroBatch]:
    """What `packed` was given.

    Args:
        numbers: of the micro-batches within the global batch.
    """
    tokens = planes[0].long()
    return [
        MicroBatch(
            index=number,
            tokens=tokens[place, :, :-1].contiguous(),
            labels=tokens[place, :, 1:].contiguous(),
            loss_mask=planes[1, place, :, :-1].float(),
            documents=planes[2, place, :, :-1].long().contiguous() if len(planes) == 3 else None,
            sources=planes[1, place, :, -1].long().contiguous(),
        )
        for place, number in enumerate(numbers)
    ]


def prefetched(load: Callable[[int], T], begin: int, end: int, ahead: int) -> Iterator[T]:
    """``load(step)`` for each step, up to ``ahead`` steps early on a thread. The order is that of the steps."""
    if ahead == 0:
        yield from map(load, range(begin, end))
        return
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="skv-data")
    try:
        waiting = [pool.submit(load, step) for step in range(begin, min(begin + ahead, end))]
        for step in range(begin, end):
            if step + ahead < end:
                waiting.append(pool.submit(load, step + ahead))
            yield waiting.pop(0).result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
