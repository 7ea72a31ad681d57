"""The training loop."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from skv_dist.config.run import Derived, RunConfig
from skv_dist.data.batches import MicroBatch, Samples, micro_batches, prefetched
from skv_dist.parallel.engine import Engine
from skv_dist.parallel.groups import World, seed_dropout
from skv_dist.parallel.step import count_tokens, run_batch
from skv_dist.routing.draw import DrawKey
from skv_dist.training.callbacks import Callback, Metrics
from skv_dist.training.guard import Guard
from skv_dist.training.schedule import lr_at
from skv_dist.training.throughput import flops_per_token, peak_flops, peak_memory_bytes


class Trainer:
    """Runs ``train.steps`` steps; a step is one global batch, one update, one line of metrics.

    Args:
        engine: owns the model and the optimizer.
        samples: the training samples, in order.
        callbacks: called in order on this rank; more may be added before `fit`.
    """

    def __init__(
        self,
        run: RunConfig,
        derived: Derived,
        world: World,
        engine: Engine,
        vocab_size: int,
        samples: Samples,
        callbacks: Sequence[Callback],
    ) -> None:
        self.run, self.derived, self.world, self.engine = run, derived, world, engine
        self.samples, self.callbacks = samples, list(callbacks)
        self.step = 0  # steps behind us
        self.policy = run.policy()
        self.guard = Guard(run.train)
        self.stopped_by: str | None = None
        peak = peak_flops(world.device)
        flops = flops_per_token(run.model, vocab_size, run.data.sequence_length)
        self._mfu_per_token_rate = flops / (peak * world.size) if peak else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run beside weights and optimizer state. All else follows from the step."""
        samples = self.step * self.run.train.global_batch_size
        return {"step": self.step, "samples": samples, "guard": self.guard.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.step = state["step"]
        self.guard.restore(state["guard"])

    def fit(self) -> None:
        """Train to the end, or until SIGTERM: then `stopped_by` says so and the step in progress is finished.

        Raises:
            UserError: too many steps in a row had to be left out.
        """
        try:
            for callback in self.callbacks:
                callback.on_start(self.step, self.run.train.steps)
            with _terminate_after_step() as asked:
                began = time.perf_counter()
                for batches in self._global_batches():
                    metrics = self._train_step(batches, asked)
                    seconds = time.perf_counter() - began
                    self._measure(metrics, seconds)
                    for callback in self.callbacks:
                        callback.on_step(self.step, metrics)
                    if self.stopped_by:
                        break
                    began = time.perf_counter()
        finally:
            for callback in self.callbacks:
                callback.on_end()

    def _global_batches(self) -> Iterator[list[MicroBatch]]:
        train, data = self.run.train, self.run.data

        def load(step: int) -> list[MicroBatch]:
            batches = micro_batches(
                self.samples, step * train.global_batch_size, self.derived.num_micro_batches, train.micro_batch_size,
                self.world.data_rank, self.world.data_size, data.reset_attention,
            )  # fmt: skip
            return [batch.pinned() for batch in batches] if self.world.device.type == "cuda" else batches

        return prefetched(load, self.step, train.steps, data.prefetch_steps)

    def _train_step(self, loaded: list[MicroBatch], asked_to_stop: list[str]) -> Metrics:
        run, engine, device = self.run, self.engine, self.world.device
        batches = [batch.to(device) for batch in loaded]
        plans = [self.policy.plan(DrawKey(run.train.seed, self.step, batch.index)) for batch in batches]
        if run.model.attention_dropout or run.model.hidden_dropout:
            seed_dropout(run.train.seed, self.step, batches[0].index)
        lr = lr_at(self.step, run.train.steps, run.optimizer)
        engine.set_lr(lr)
        tokens = count_tokens(batches)
        batch = run_batch(engine, run, batches, plans, tokens=tokens, train=True)
        # From here to the one read below the device decides, so that it need not wait for the host.
        mean = batch.loss.double()
        refused = ~(mean.isfinite() & (mean <= self.guard.limit))
        leave_out, stop = self._agree(refused, torch.full((), bool(asked_to_stop), device=device))
        outcome = engine.step(leave_out)
        results = (mean, outcome.grad_norm, outcome.applied, stop)
        loss, grad_norm, applied, stopped = torch.stack([result.to(mean) for result in results]).tolist()
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
            "loss": loss, "grad_norm": grad_norm, "lr": lr, "skipped": self.guard.skipped,
            "tokens": self.step * self.derived.tokens_per_step,
        }  # fmt: skip
        if run.parallel.pipeline > 1:
            metrics["wire_bytes"] = self._sum(batch.wire_bytes)
        return metrics

    def _sum(self, count: int) -> int:
        total = torch.tensor(count, dtype=torch.int64, device=self.world.device)
        dist.all_reduce(total)
        return int(total.item())

    def _agree(self, *flags: torch.Tensor) -> Sequence[torch.Tensor]:
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
