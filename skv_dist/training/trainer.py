"""The training loop."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from skv_dist.config.run import Derived, RunConfig
from skv_dist.data.batches import Samples
from skv_dist.data.open import Blend
from skv_dist.data.stream import TrainingStream
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.processes.groups import World, seed_dropout
from skv_dist.parallel.run_batch import Work, count_predictions, means_by_source, run_batch, sums_by_source
from skv_dist.parallel.teacher import Teacher
from skv_dist.routing.draw import DrawKey
from skv_dist.training.callbacks import Callback, Metrics
from skv_dist.training.guard import Guard
from skv_dist.training.reading import OwnReading, Reading, StreamReading
from skv_dist.training.schedule import lr_at
from skv_dist.training.stop import BY_WEIGHT, StopRequest
from skv_dist.training.throughput import flops_per_token, peak_flops, peak_memory_bytes


@dataclass(frozen=True)
class LaunchedStep:
    """A step that is on its way; ``results``: loss, gradient norm, whether it was applied, what asks to stop, and with
    a teacher the divergence from it. ``by_source``: `sums_by_source`, where there are several.
    """

    results: torch.Tensor
    lr: float
    wire_bytes: int
    by_source: torch.Tensor | None


class Trainer:
    """Runs ``train.steps`` steps; a step is one global batch, one update, one line of metrics.

    Args:
        engine: owns the model and the optimizer.
        samples: the training samples, in order.
        teacher: with ``distillation.weight`` above 0.
    """

    def __init__(
        self,
        run: RunConfig,
        derived: Derived,
        world: World,
        engine: Engine,
        samples: Samples,
        teacher: Teacher | None = None,
    ) -> None:
        self.run, self.derived, self.world, self.engine = run, derived, world, engine
        self._teacher = teacher
        self._blend = samples if isinstance(samples, Blend) else None
        self.num_sequences = None if self._blend is None else self._blend.num_sequences  # of an epoch
        self._sources = samples.names if isinstance(samples, Blend | TrainingStream) else []
        self._reading: Reading
        if isinstance(samples, TrainingStream):
            self._reading = StreamReading(run, derived, world, samples)
        else:
            self._reading = OwnReading(run, derived, world, samples)
        self.step = 0  # steps behind us
        # The step, sample and token from which the size of batches and sequences is that of today.
        self._began = (0, 0, 0)
        self.policy = run.policy()
        self.guard = Guard(run.train)
        self.stopped_by: signal.Signals | None = None
        self.save_due = False  # by the clock of the first rank (checkpoint.every_minutes)
        self._save_at = self._next_save()
        peak = peak_flops(world.device)
        flops = flops_per_token(run)
        self._mfu_per_token_rate = flops / (peak * world.size) if peak else None

    def _next_save(self) -> float:
        minutes = self.run.checkpoint.every_minutes
        return time.monotonic() + 60 * minutes if minutes else math.inf

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run beside weights and optimizer state. All else follows from the step.

        Collective. Where a stream is, the first rank alone knows.
        """
        position = self._samples_before(self.step)
        tokens = self._tokens_before(self.step)
        state = {"step": self.step, "samples": position, "tokens": tokens, "guard": self.guard.state()}
        stream = self._reading.stream_state(self.step, position)
        return state if stream is None else {**state, "stream": stream}

    def close(self) -> None:
        """Let go of what the reading of data holds."""
        self._reading.close()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.step = state["step"]
        # Before tokens were noted, sequences kept their length.
        tokens = state.get("tokens", state["samples"] * self.run.data.sequence_length)
        self._began = (state["step"], state["samples"], tokens)
        self.guard.restore(state["guard"])

    def _samples_before(self, step: int) -> int:
        """How many samples the steps before this one read, with whichever batch size each part of the run had."""
        first_step, first_sample, _ = self._began
        return first_sample + (step - first_step) * self.run.train.global_batch_size

    def _tokens_before(self, step: int) -> int:
        _, first_sample, first_token = self._began
        return first_token + (self._samples_before(step) - first_sample) * self.run.data.sequence_length

    def fit(self, callbacks: Sequence[Callback] = (), stop: StopRequest | None = None) -> None:
        """Train to the end, or until a signal: then `stopped_by` names it and the step in progress is finished.

        Args:
            callbacks: called in this order at each step of this rank.
            stop: takes the signals, also behind the return, when the last save is still to come.

        Raises:
            UserError: too many updates in a row had to be skipped.
        """
        try:
            for callback in callbacks:
                callback.on_start(self.step, self.run.train.steps)

            def asked() -> int:
                by_signal = 0 if stop is None else stop.weight
                return max(by_signal, int(any(callback.stop_reason is not None for callback in callbacks)))

            if stop is not None:
                stop.defer(says_so=self.world.is_first)
            if self.step == 0 and self.run.eval.at_start:
                before: Metrics = {}
                for callback in callbacks:
                    callback.on_step(0, before)
            coming = self._work()
            work = next(coming, None)
            while work and not self.stopped_by and not any(callback.finished for callback in callbacks):
                began = time.perf_counter()
                launched = self.launch(work, asked)
                try:
                    work = next(coming, None)  # while the device is busy
                finally:  # whatever is wrong with the next batch, this step is recorded and saved
                    metrics = self._finish(launched)
                    self._measure(metrics, time.perf_counter() - began)
                    for callback in callbacks:
                        callback.on_step(self.step, metrics)
        finally:
            for callback in callbacks:
                callback.on_end()

    def _work(self) -> Iterator[list[Work]]:
        """For each step this replica's micro-batches, on the device, and their route plans."""
        train, device = self.run.train, self.world.device
        loaded = self._reading.steps(self.step, train.steps, self._samples_before)
        for step, batches in enumerate(loaded, self.step):
            keys = (DrawKey(train.seed, step, batch.index) for batch in batches)
            yield [(batch.to(device), self.policy.plan(key)) for batch, key in zip(batches, keys)]

    def launch(self, work: list[Work], stop_asked: Callable[[], int] = lambda: 0) -> LaunchedStep:
        """Queue one step. Its results are on the device, which decides by itself whether to update.

        Args:
            stop_asked: what asks the run to end after this step, as an index of `BY_WEIGHT`. Called behind the
                backward, which takes most of the step's time, so that a signal that comes meanwhile still counts.
        """
        run, engine, device = self.run, self.engine, self.world.device
        batches, plans = [batch for batch, _ in work], [plan for _, plan in work]
        if run.model.attention_dropout or run.model.hidden_dropout:
            seed_dropout(run.train.seed, self.step, batches[0].index)
        lr = lr_at(self.step, run.train.steps, run.optimizer)
        engine.set_lr(lr)
        count = count_predictions(batches)
        batch = run_batch(engine, run, batches, plans, num_predictions=count, train=True, teacher=self._teacher)
        mean = batch.loss.double()
        refused = ~(mean.isfinite() & (mean <= self.guard.limit))
        asked = torch.full((), stop_asked(), device=device)
        due = torch.full((), int(self.world.is_first and time.monotonic() >= self._save_at), device=device)
        skip_update, asked, due = self._largest_anywhere(refused, asked, due)
        outcome = engine.step(skip_update.bool())
        results = [mean, outcome.grad_norm, outcome.applied, asked, due]
        if batch.divergence is not None:
            results.append(batch.divergence)
        by_source = sums_by_source(batch.sums, batches, len(self._sources)) if len(self._sources) > 1 else None
        return LaunchedStep(torch.stack([result.to(mean) for result in results]), lr, batch.wire_bytes, by_source)

    def _finish(self, launched: LaunchedStep) -> Metrics:
        """Wait for a step, and judge it."""
        loss, grad_norm, applied, asked, due, *divergence = launched.results.tolist()
        objection = self.guard.objection(loss)
        if not applied and objection is None:
            objection = f"the gradient norm is {grad_norm}"
        self.step += 1
        if objection is not None and self.world.is_first:
            print(f"step {self.step}: update skipped: {objection}", flush=True)
        self.guard.record(self.step, loss, objection)
        self.stopped_by = BY_WEIGHT[int(asked)]
        self.save_due = bool(due)
        if self.save_due:
            self._save_at = self._next_save()
        metrics: Metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": launched.lr,
            "skipped": self.guard.skipped,
            "tokens": self._tokens_before(self.step),
        }
        if launched.by_source is not None:
            metrics.update(_named("loss", means_by_source(launched.by_source, self._sources)))
        if self._blend is not None:
            read = self._samples_before(self.step)
            metrics["epoch"] = read / self._blend.num_sequences
            if len(self._sources) > 1:
                metrics.update(_named("epoch", self._blend.epochs(read)))
        if divergence:
            (metrics["teacher_kl"],) = divergence
        if self.run.parallel.pipeline > 1:
            metrics["wire_bytes"] = self._sum(launched.wire_bytes)
        return metrics

    def _sum(self, count: int) -> int:
        summed = torch.tensor(count, dtype=torch.int64, device=self.world.device)
        dist.all_reduce(summed)
        return int(summed.item())

    def _largest_anywhere(self, *votes: torch.Tensor) -> Sequence[torch.Tensor]:
        """For each vote (a scalar on the device, a bool counting as 0 or 1) the largest of all ranks."""
        stacked = torch.stack([vote.int() for vote in votes])
        if self.world.size > 1:
            dist.all_reduce(stacked, dist.ReduceOp.MAX)
        return stacked.unbind()

    def _measure(self, metrics: Metrics, seconds: float) -> None:
        rate = self.derived.tokens_per_step / seconds
        metrics["tokens_per_second"] = rate
        if self._mfu_per_token_rate is not None:
            metrics["mfu"] = rate * self._mfu_per_token_rate
        metrics["peak_memory_bytes"] = peak_memory_bytes(self.world.device)


def _named(metric: str, of_sources: Metrics) -> Metrics:
    return {f"{metric}/{name}": value for name, value in of_sources.items()}
