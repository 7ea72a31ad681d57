"""Losses of one micro-batch under many route plans: layers that plans agree on run once for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from skv_dist.model.attention import KV
from skv_dist.model.chunk import LiveKV, RoutedChunk
from skv_dist.model.places import Places
from skv_dist.routing import RoutePlan

Step = tuple[int, bool]  # what the output of a layer depends on, beside its input and the K/V of earlier layers


def sums_of_plans(
    chunk: RoutedChunk,
    plans: Sequence[RoutePlan],
    tokens: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """The summed loss of each sequence under each plan: that of `RoutedChunk.forward`, bit by bit.

    Args:
        chunk: all layers of the model, in evaluation. Call without gradient.
        tokens, labels, documents: [b, s], see `RoutedChunk.forward`.
        loss_mask: [b, s], what the loss of each token counts.

    Returns:
        In nats, float32 [len(plans), b].
    """
    walk = _Walk(
        chunk,
        plans,
        labels,
        loss_mask,
        places=chunk.places(tokens, documents),
        sums=torch.empty(len(plans), tokens.shape[0], device=tokens.device),
    )
    walk.descend(0, chunk.embed(tokens), {}, range(len(plans)))
    return walk.sums


@dataclass
class _Walk:
    """Depth first through the tree of the plans, in which two of them part at the first layer where they differ.

    A hidden state, and the K/V that are still read, wait at each layer on the way where plans part: at no time more
    than there are layers.

    Attributes:
        sums: [plans, b], filled at the end of each branch.
    """

    chunk: RoutedChunk
    plans: Sequence[RoutePlan]
    labels: torch.Tensor
    loss_mask: torch.Tensor
    places: Places
    sums: torch.Tensor

    def descend(self, number: int, hidden: torch.Tensor, live: LiveKV, members: Sequence[int]) -> None:
        """Run the plans ``members``, which agree on all layers below ``number``, to their end.

        Args:
            hidden: what layer ``number`` takes in.
            live: K/V of layers below it.
        """
        while number < self.chunk.num_layers:
            branches = self._branches(number, members)
            if len(branches) > 1:
                for step, branch in branches.items():
                    out, lent = self._run_layer(number, step, hidden, live, branch)
                    self.descend(number + 1, out, lent, branch)
                return
            (step,) = branches
            hidden, live = self._run_layer(number, step, hidden, live, members)
            number += 1
        losses = self.chunk.head(hidden, self.labels, None, True)  # [b, s]
        self.sums[list(members)] = (losses * self.loss_mask).sum(dim=-1)

    def _branches(self, number: int, members: Sequence[int]) -> dict[Step, list[int]]:
        """The plans by what they make of a layer.

        A layer that keeps its own K/V gives the same whether others read them or not. One that borrows projects its
        own only where it lends them (`RoutedSelfAttention`), and may round otherwise.
        """
        branches: dict[Step, list[int]] = {}
        for member in members:
            plan = self.plans[member]
            source = plan.source(number)
            step = (source, source != number and plan.last_reader[number] > number)
            branches.setdefault(step, []).append(member)
        return branches

    def _run_layer(
        self, number: int, step: Step, hidden: torch.Tensor, live: LiveKV, members: Sequence[int]
    ) -> tuple[torch.Tensor, LiveKV]:
        """The hidden state behind a layer, and the K/V that any of ``members`` reads there or later."""
        source, _ = step
        borrowed = None if source == number else live[source]
        last_reader = [max(readers) for readers in zip(*(self.plans[member].last_reader for member in members))]
        lends = last_reader[number] > number
        hidden, own = self.chunk.run_layer(number, hidden, self.places, borrowed, lends, None)
        lent: dict[int, KV] = live if own is None else {**live, number: own}
        return hidden, {layer: kv for layer, kv in lent.items() if last_reader[layer] > number}
