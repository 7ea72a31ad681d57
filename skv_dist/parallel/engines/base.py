"""What the trainer needs of whatever owns parameters, gradients and optimizer state."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from skv_dist.data.batches import MicroBatch
from skv_dist.model.kv_cache import KvCache
from skv_dist.parallel.engines.optimizer import GuardedAdamW, Update
from skv_dist.parallel.engines.tied import TiedHead
from skv_dist.parallel.local_model import LocalModel
from skv_dist.routing import RoutePlan


class Quantity(StrEnum):
    """What a parameter has: its fp32 weight, and Adam's moments. The values are the prefixes of names on disk."""

    WEIGHT = "model"
    EXP_AVG = "exp_avg"
    EXP_AVG_SQ = "exp_avg_sq"


MOMENTS = (Quantity.EXP_AVG, Quantity.EXP_AVG_SQ)


class Piece(NamedTuple):
    """Consecutive elements of a tensor-parallel rank's part.

    Attributes:
        begin: place of the first in the part, laid end to end.
        values: float32 [n]; not a copy.
    """

    begin: int
    values: torch.Tensor


@dataclass(frozen=True)
class StepOutcome:
    """Result of one optimizer step.

    Attributes:
        grad_norm: global L2 norm of the gradient before clipping; infinite or NaN where a gradient is.
        applied: False where the update was skipped.

    Both are scalars on the device, float32 and bool, so that nobody has to wait for them.
    """

    grad_norm: torch.Tensor
    applied: torch.Tensor


class Engine(ABC):
    """Owns the parameters of one rank. Gradients are averaged over data-parallel replicas, accumulated in fp32.

    Attributes:
        model: the chunks of this rank.
        optimizer: over the fp32 weights that this rank updates.
        unset: parameters whose weight was neither drawn nor written yet. Nothing is computed while there are any.
    """

    model: LocalModel
    optimizer: GuardedAdamW
    tied: TiedHead
    unset: set[torch.nn.Parameter]

    def forward(
        self,
        index: int,
        plan: RoutePlan,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        received: torch.Tensor | None = None,
        width: int | None = None,
        cache: KvCache | None = None,
        teacher: torch.Tensor | None = None,
        gather: bool = True,
    ) -> torch.Tensor:
        """`LocalModel.run_chunk`, with or without gradient.

        Raises:
            RuntimeError: the weights were not drawn, and not all of them were written since.
        """
        self._check_weights()
        batch = (tokens, labels, documents)
        return self._call(self.model.run_chunk, index, plan, *batch, received, width, cache, teacher, gather)

    @torch.no_grad()
    def forward_plans(self, plans: Sequence[RoutePlan], batch: MicroBatch) -> torch.Tensor:
        """`LocalModel.run_plans`, without gradient or dropout. Where this rank holds the whole model.

        Raises:
            RuntimeError: see `forward`.
        """
        self._check_weights()
        self.eval()
        return self._call(self.model.run_plans, plans, batch)

    def eval(self) -> None:
        """No dropout and no recomputation from here on."""
        if self.model.training:  # eval() walks through all modules
            self.model.eval()

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Within this context forwards without gradient wait for no other replica, however many each makes.
        Collective over replicas at either end. Takes the memory of the whole weights where an engine shards them.
        """
        return contextlib.nullcontext()

    def _check_weights(self) -> None:
        if self.unset:
            names = sorted(name for name, parameter in self.model.named() if parameter in self.unset)
            raise RuntimeError(f"{len(names)} parameters have no value yet, such as {names[0]}")

    def _call(self, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        """A method of the model, called through whatever must see every forward."""
        return self.model(function, *args)

    def step(self, skip_update: torch.Tensor | bool = False) -> StepOutcome:
        """Reduce, clip and update with all gradients since the last step, and clear them.

        Args:
            skip_update: (scalar on the device) clear the gradients without an update. Must be the same on all ranks.
        """
        outcome = self._update(skip_update)
        self.tied.refresh()
        return outcome

    def assign(self, values: Iterator[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
        """Set parameters, fp32 weights included, from this tensor-parallel rank's parts. Collective."""
        for parameter, value in values:
            self.write(parameter, Quantity.WEIGHT, value)
        self.tied.refresh()

    def add_tied_gradient(self) -> None:
        """Add the head's gradient to that of the embedding it is tied to, where they are on different stages."""
        gradient = self.tied.gradient()
        if gradient is not None:
            self._call(self.model.dot_with_embedding, gradient).backward()

    @abstractmethod
    def _update(self, skip_update: torch.Tensor | bool) -> StepOutcome: ...

    @abstractmethod
    def read(self, parameter: torch.nn.Parameter, quantity: Quantity) -> torch.Tensor:
        """fp32 value of this tensor-parallel rank's part. Collective over data-parallel ranks.

        Moments can be read after `prepare_moments`. A frozen parameter has none, and no master: what is read of it is
        the working copy.
        """

    def own_piece(self, parameter: torch.nn.Parameter, quantity: Quantity) -> Piece | None:
        """What this rank alone holds of its part, of which the replicas share out the elements. No communication.

        Moments can be read after `prepare_moments`.

        Returns:
            None where every replica holds the whole part, so that `read` needs no communication either.
        """
        return None

    def write(self, parameter: torch.nn.Parameter, quantity: Quantity, value: torch.Tensor) -> None:
        """The inverse of `read`; of a weight also the working copy. No communication.

        A caller refreshes `tied` behind the last one.
        """
        self._write(parameter, quantity, value)
        if quantity is Quantity.WEIGHT:
            self.unset.discard(parameter)

    @abstractmethod
    def _write(self, parameter: torch.nn.Parameter, quantity: Quantity, value: torch.Tensor) -> None: ...

    @abstractmethod
    def set_clip_grad_norm(self, limit: float) -> None:
        """Clip gradients to this global norm from the next step on; 0: no clipping."""

    @abstractmethod
    def _masters(self) -> Sequence[torch.Tensor]:
        """The masters of this rank: the fp32 weights that the optimizer updates."""

    def replace_update(self, update: Update) -> None:
        """From the next step on, call ``update(weight, gradient)`` in place of AdamW for each fp32 tensor that this
        rank updates, skipped updates included. Gradients come reduced, and divided by what clipping asks for.

        A seam for those who look at gradients, such as tests.
        """
        self.optimizer.update = update

    def prepare_moments(self) -> None:
        """Make Adam's state, as its first step would."""
        for weight in self._masters():
            state = self.optimizer.state[weight]
            if not state:
                device = weight.device if self.optimizer.defaults["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for moment in MOMENTS:
                    # A plain string: this dictionary is the optimizer's own.
                    state[moment.value] = torch.zeros_like(weight, memory_format=torch.preserve_format)

    @property
    def num_updates(self) -> int:
        """Updates that Adam has made (after `prepare_moments`)."""
        return int(self.optimizer.state[self._masters()[0]]["step"].item())

    @num_updates.setter
    def num_updates(self, count: int) -> None:
        for weight in self._masters():
            self.optimizer.state[weight]["step"].fill_(float(count))

    def close(self) -> None:
        """Take hooks off the parameters. Without it an engine, with its process groups, outlives its last reference."""
        self.model.on_backward = None

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
