"""The training loop."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from skv_dist.config.run import Derived, RunConfig
from skv_dist.data.batches import MicroBatch, Samples, micro_batches, prefetched
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.processes.groups import World, seed_dropout
from skv_dist.parallel.run_batch import Work, count_predictions, run_batch
from skv_dist.routing.draw import DrawKey
from skv_dist.training.callbacks import Callback, Metrics
from skv_dist.training.guard import Guard
from skv_dist.training.schedule import lr_at
from skv_dist.training.throughput import flops_per_token, peak_flops, peak_memory_bytes


@dataclass(frozen=True)
class LaunchedStep:
    """A step that is on its way; ``results``: loss, gradient norm, whether it was applied, whether to stop."""

    results: torch.Tensor
    lr: float
    wire_bytes: int


class Trainer:
    """Runs ``train.steps`` steps; a step is one global batch, one update, one line of metrics.

    Args:
        engine: owns the model and the optimizer.
        samples: the training samples, in order.
    """

    def __init__(
        self,
        run: RunConfig,
        derived: Derived,
        world: World,
        engine: Engine,
        samples: Samples,
    ) -> None:
        self.run, self.derived, self.world, self.engine = run, derived, world, engine
        self.samples = samples
        self.step = 0  # steps behind us
        self.policy = run.policy()
        self.guard = Guard(run.train)
        self.stopped_by: str | None = None
        peak = peak_flops(world.device)
        flops = flops_per_token(run)
        self._mfu_per_token_rate = flops / (peak * world.size) if peak else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run beside weights and optimizer state. All else follows from the step."""
        samples = self.step * self.run.train.global_batch_size
        return {"step": self.step, "samples": samples, "guard": self.guard.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.step = state["step"]
        self.guard.restore(state["guard"])

    def fit(self, callbacks: Sequence[Callback] = ()) -> None:
        """Train to the end, or until SIGTERM: then `stopped_by` says so and the step in progress is finished.

        Args:
            callbacks: called in this order at each step of this rank.

        Raises:
            UserError: too many updates in a row had to be skipped.
        """
        try:
            for callback in callbacks:
                callback.on_start(self.step, self.run.train.steps)
            with _terminate_after_step() as asked:
                coming = self._work()
                work = next(coming, None)
                while work and not self.stopped_by:
                    began = time.perf_counter()
                    launched = self.launch(work, asked)
                    try:
                        work = next(coming, None)  # while the device is busy
                    finally:  # whatever is wrong with the next batch, this step is recorded and saved
                        metrics = self._finish(launched)
                        self._measure(metrics, time.perf_counter() - began)
                        for callback in callbacks:
                            callback.on_step(self.step, metrics)
                            asked.extend([callback.stop_reason] if callback.stop_reason else [])
        finally:
            for callback in callbacks:
                callback.on_end()

    def _work(self) -> Iterator[list[Work]]:
        """For each step this replica's micro-batches, on the device, and their route plans."""
        train, data, device = self.run.train, self.run.data, self.world.device

        def load(step: int) -> list[MicroBatch]:
            batches = micro_batches(
                self.samples,
                step * train.global_batch_size,
                self.derived.num_micro_batches,
                train.micro_batch_size,
                self.world.data_rank,
                self.world.data_size,
                data.reset_attention,
            )
            return [batch.pinned() for batch in batches] if device.type == "cuda" else batches

        loaded = prefetched(load, self.step, train.steps, data.prefetch_steps)
        for step, batches in enumerate(loaded, self.step):
            keys = (DrawKey(train.seed, step, batch.index) for batch in batches)
            yield [(batch.to(device), self.policy.plan(key)) for batch, key in zip(batches, keys)]

    def launch(self, work: list[Work], stop_asked: Sequence[str] = ()) -> LaunchedStep:
        """Queue one step. Its results are on the device, which decides by itself whether to update.

        Args:
            stop_asked: not empty once the run is to end after a step. Looked at behind the backward, which takes most
                of the step's time: what is asked for meanwhile still counts for this step.
        """
        run, engine, device = self.run, self.engine, self.world.device
        batches, plans = [batch for batch, _ in work], [plan for _, plan in work]
        if run.model.attention_dropout or run.model.hidden_dropout:
            seed_dropout(run.train.seed, self.step, batches[0].index)
        lr = lr_at(self.step, run.train.steps, run.optimizer)
        engine.set_lr(lr)
        batch = run_batch(engine, run, batches, plans, num_predictions=count_predictions(batches), train=True)
        mean = batch.loss.double()
        refused = ~(mean.isfinite() & (mean <= self.guard.limit))
        skip_update, stop = self._true_anywhere(refused, torch.full((), bool(stop_asked), device=device))
        outcome = engine.step(skip_update)
        results = (mean, outcome.grad_norm, outcome.applied, stop)
        return LaunchedStep(torch.stack([result.to(mean) for result in results]), lr, batch.wire_bytes)

    def _finish(self, launched: LaunchedStep) -> Metrics:
        """Wait for a step, and judge it."""
        loss, grad_norm, applied, stopped = launched.results.tolist()
        objection = self.guard.objection(loss)
        if not applied and objection is None:
            objection = f"the gradient norm is {grad_norm}"
        self.step += 1
        if objection is not None and self.world.is_first:
            print(f"step {self.step}: update skipped: {objection}", flush=True)
        self.guard.record(self.step, loss, objection)
        if stopped:
            self.stopped_by = "SIGTERM"
        metrics: Metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": launched.lr,
            "skipped": self.guard.skipped,
            "tokens": self.step * self.derived.tokens_per_step,
        }
        if self.run.parallel.pipeline > 1:
            metrics["wire_bytes"] = self._sum(launched.wire_bytes)
        return metrics

    def _sum(self, count: int) -> int:
        summed = torch.tensor(count, dtype=torch.int64, device=self.world.device)
        dist.all_reduce(summed)
        return int(summed.item())

    def _true_anywhere(self, *flags: torch.Tensor) -> Sequence[torch.Tensor]:
        """Each flag (a bool scalar on the device), true everywhere if it is true on any rank."""
        votes = torch.stack(flags).int()
        if self.world.size > 1:
            dist.all_reduce(votes, dist.ReduceOp.MAX)
        return votes.bool().unbind()

    def _measure(self, metrics: Metrics, seconds: float) -> None:
        rate = self.derived.tokens_per_step / seconds
        metrics["tokens_per_second"] = rate
        if self._mfu_per_token_rate is not None:
            metrics["mfu"] = rate * self._mfu_per_token_rate
        metrics["peak_memory_bytes"] = peak_memory_bytes(self.world.device)


@contextmanager
def _terminate_after_step() -> Iterator[list[str]]:
    """A list that gets an entry when SIGTERM arrives, instead of the process's end."""
    asked: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append("SIGTERM"))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
