"""What happens around the steps of a run: logging, evaluation and whatever a user adds."""

import contextlib
import errno
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from skv_dist.checkpoint.folder import METRICS
from skv_dist.checkpoint.save import Saver

Metrics = dict[str, float | int]
ENOUGH = "the run ends (eval.patience)"  # said by a run that ends as nothing gets better


class Callback:
    """Hooks of the training loop. Every rank calls them in the same order, so a callback may use collectives."""

    stop_reason: str | None = None
    """Set by a callback, on any rank, to end the run after the next step: something has failed."""

    finished: bool = False
    """Set by a callback, on all ranks at once, to end the run as after its last step."""

    def on_start(self, step: int, steps: int) -> None:
        """Before the first step of this process; ``step`` steps are behind it."""

    def on_step(self, step: int, metrics: Metrics) -> None:
        """After step number ``step`` (from 1). What is added to ``metrics`` is seen by later callbacks."""

    def on_end(self) -> None:
        """After the last step, also when the run fails."""


class Evaluation(Callback):
    """Adds the results of all of ``evaluate`` to the metrics every so many steps, and at the last."""

    def __init__(self, evaluate: Sequence[Callable[[], dict[str, float]]], every: int, steps: int) -> None:
        self._evaluate, self._every, self._steps = evaluate, every, steps

    def on_step(self, step: int, metrics: Metrics) -> None:
        if step % self._every == 0 or step == self._steps:
            for evaluate in self._evaluate:
                metrics.update({f"eval/{name}": value for name, value in evaluate().items()})


class Best(Callback):
    """Notes which evaluation was the best, and ends the run where none was better for long.

    Args:
        name: of the evaluation. A loss is better where it is lower, a score where it is higher.
        patience: evaluations in a row without a better value that end the run; None: none do.

    Attributes:
        step, value: of the best evaluation.
        without: evaluations since then.
        is_new: whether it is that of the last step.
    """

    def __init__(self, name: str, patience: int | None, says_so: bool) -> None:
        self.name, self._patience, self._says_so = name, patience, says_so
        self._lower = name.startswith("loss@")
        self._nothing = math.inf if self._lower else -math.inf
        self.step, self.value, self.without, self.is_new = 0, self._nothing, 0, False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        value = None if math.isinf(self.value) else self.value
        return {"name": self.name, "step": self.step, "value": value, "without": self.without}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on where `state` was taken; anew where it is of another evaluation."""
        if state is not None and state["name"] == self.name and state["value"] is not None:
            self.step, self.value, self.without = state["step"], state["value"], state["without"]

    def on_start(self, step: int, steps: int) -> None:
        self._end_if_enough()

    def on_step(self, step: int, metrics: Metrics) -> None:
        value = metrics.get(f"eval/{self.name}")
        better = value is not None and (value < self.value if self._lower else value > self.value)
        self.is_new = step > 0 and better
        if step == 0 or value is None:
            return
        if better:
            self.step, self.value, self.without = step, value, 0
        else:
            self.without += 1
            self._end_if_enough()

    @property
    def _better(self) -> str:
        return "lower" if self._lower else "higher"

    def _end_if_enough(self) -> None:
        if self._patience is None or self.without < self._patience:
            return
        self.finished = True
        if self._says_so:
            print(
                f"{self.name} was {self.value:.4f} at step {self.step} and not {self._better} in {self.without} "
                f"evaluations since: {ENOUGH}",
                flush=True,
            )


class Checkpoints(Callback):
    """Saves every so many steps or minutes, and where an evaluation was the best; adds the seconds that training stood
    still for it to the metrics.

    Args:
        every: steps between checkpoints; 0: none by steps.
        state: what a checkpoint keeps of the run beside weights and optimizer state.
        is_due: whether it is time for one, alike on all ranks.
        best: what notes the best evaluation.
    """

    def __init__(
        self,
        saver: Saver,
        every: int,
        state: Callable[[], dict[str, Any]],
        is_due: Callable[[], bool] = lambda: False,
        best: Best | None = None,
    ) -> None:
        self._saver, self._every, self._state, self._is_due, self._best = saver, every, state, is_due, best

    def on_step(self, step: int, metrics: Metrics) -> None:
        is_best = self._best is not None and self._best.is_new
        if step and (is_best or (step % self._every == 0 if self._every else self._is_due())):
            began = time.perf_counter()
            self._saver.save(step, self._state())
            metrics["checkpoint/stall_seconds"] = time.perf_counter() - began


class JsonLines(Callback):
    """``metrics.jsonl``: one object per step, written at once and whole, with the time at which it is.

    A line that cannot be written, on a full disk say, is kept and tried again with the next; the run is asked to stop
    (`stop_reason`), as a training whose record is lost is not worth its time.
    """

    def __init__(self, file: Path) -> None:
        self._path = file
        self._file: BinaryIO | None = None
        self._unwritten: list[bytes] = []

    def on_start(self, step: int, steps: int) -> None:
        self._file = self._path.open("ab", buffering=0)

    def on_step(self, step: int, metrics: Metrics) -> None:
        self._unwritten.append(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}).encode() + b"\n")
        self._write()

    def _write(self) -> None:
        assert self._file is not None
        content = b"".join(self._unwritten)
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(content)
            if written != len(content):  # the disk had room for a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), end)
            if self.stop_reason is None:
                self.stop_reason = f"{self._path} cannot be written: {error.strerror}"
                print(f"{self.stop_reason}; the run ends after the next step", flush=True)
            return
        self._unwritten = []

    def on_end(self) -> None:
        if self._file is None:
            return
        if self._unwritten:
            self._write()
        if self._unwritten:
            self.stop_reason = f"{self.stop_reason}, and the lines of the last {len(self._unwritten)} steps are lost"
        self._file.close()


class TensorBoard(Callback):
    """The same numbers as in ``metrics.jsonl``. Where they cannot be written any more, the run says so and goes on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def on_start(self, step: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _without_tensorboard(threading.excepthook)
        with self._giving_up():
            self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else None)

    def on_step(self, step: int, metrics: Metrics) -> None:
        with self._giving_up():
            for name, value in metrics.items():
                if self._writer is not None:
                    self._writer.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def on_end(self) -> None:
        if self._writer is not None:
            with self._giving_up():
                self._writer.close()

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # of its thread too, which has ended then
            self._writer = None
            reason = error.strerror or error
            print(
                f"{self._folder} cannot be written: {reason}; going on without, {METRICS} has the numbers", flush=True
            )


def _without_tensorboard(
    hook: Callable[[threading.ExceptHookArgs], Any],
) -> Callable[[threading.ExceptHookArgs], Any]:
    """``hook``, silent on a disk error of the thread that writes events: the next write raises the same in ours."""
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    def show(arguments: threading.ExceptHookArgs) -> None:
        if not (isinstance(arguments.thread, _AsyncWriterThread) and isinstance(arguments.exc_value, OSError)):
            hook(arguments)

    return show


class Console(Callback):
    """A progress bar on a terminal; elsewhere a line now and then."""

    seconds_between_lines = 15.0

    def __init__(self) -> None:
        self._bar: Any = None
        self._steps = 0
        self._last_line = 0.0

    def on_start(self, step: int, steps: int) -> None:
        self._steps = steps
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def on_step(self, step: int, metrics: Metrics) -> None:
        shown = {}
        if "loss" in metrics:  # an evaluation before the first step has none
            shown = {"loss": f"{metrics['loss']:.4f}", "tok/s": f"{metrics['tokens_per_second']:,.0f}"}
            if "mfu" in metrics:
                shown["mfu"] = f"{metrics['mfu']:.1%}"
            shown["mem"] = f"{metrics['peak_memory_bytes'] / 2**30:.2f}GiB"
        evaluated = {name.removeprefix("eval/"): v for name, v in metrics.items() if name.startswith("eval/")}
        losses = {name: f"{v:.4f}" for name, v in evaluated.items() if "/" not in name}  # those by source fill lines
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            if losses:
                self._bar.write(self._line(step, losses), file=sys.stderr)
            return
        now = time.monotonic()
        if losses or now - self._last_line > self.seconds_between_lines:
            self._last_line = now
            print(self._line(step, {**shown, **losses}), file=sys.stderr, flush=True)

    def _line(self, step: int, values: dict[str, str]) -> str:
        return f"step {step}/{self._steps}  " + "  ".join(f"{name} {value}" for name, value in values.items())

    def on_end(self) -> None:
        if self._bar is not None:
            self._bar.close()
