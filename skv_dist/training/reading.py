"""Where the micro-batches of each step come from, and what a checkpoint notes of that."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from skv_dist.config.run import Derived, RunConfig
from skv_dist.data.batches import MicroBatch, Samples, micro_batch_numbers, micro_batches, prefetched
from skv_dist.data.stream import LaneStates, TrainingStream
from skv_dist.parallel.processes.groups import World
from skv_dist.parallel.shared_reading import SharedReading


class Reading(Protocol):
    """The micro-batches of this replica."""

    def steps(self, begin: int, end: int, first_sample: Callable[[int], int]) -> Iterator[list[MicroBatch]]:
        """Those of each step, in pinned memory where the device is a GPU.

        Args:
            first_sample: of a step, its position in the data.

        Raises:
            UserError: they cannot be read.
        """

    def stream_state(self, step: int, position: int) -> dict[str, Any] | None:
        """Where the stream is behind ``step`` steps, for the first rank to keep; None where there is no stream."""

    def close(self) -> None: ...


class OwnReading:
    """Every rank reads for itself: samples can be asked for by any position."""

    def __init__(self, run: RunConfig, derived: Derived, world: World, samples: Samples) -> None:
        self._run, self._derived, self._world, self._samples = run, derived, world, samples

    def steps(self, begin: int, end: int, first_sample: Callable[[int], int]) -> Iterator[list[MicroBatch]]:
        def load(step: int) -> list[MicroBatch]:
            return _pinned(self.load(first_sample(step)), self._world)

        return prefetched(load, begin, end, self._run.data.prefetch_steps)

    def load(self, first_sample: int) -> list[MicroBatch]:
        """This replica's share of the global batch that begins at a sample."""
        return micro_batches(
            self._samples,
            first_sample,
            self._derived.num_micro_batches,
            self._run.train.micro_batch_size,
            self._world.data_rank,
            self._world.data_size,
            self._run.data.reset_attention,
        )

    def stream_state(self, step: int, position: int) -> None:
        return None

    def close(self) -> None:
        pass


class StreamReading:
    """One rank of each replica reads a stream, ahead of the steps; the others receive it. All ranks take part."""

    def __init__(self, run: RunConfig, derived: Derived, world: World, stream: TrainingStream) -> None:
        self._own = OwnReading(run, derived, world, stream)
        self._stream, self._shared = stream, SharedReading()
        self._run, self._world = run, world
        self._numbers = micro_batch_numbers(derived.num_micro_batches, world.data_rank, world.data_size)
        # Where the lanes are behind each step that was handed out: the thread that reads ahead is further.
        self._behind: dict[int, LaneStates] = {}

    def steps(self, begin: int, end: int, first_sample: Callable[[int], int]) -> Iterator[list[MicroBatch]]:
        def load(step: int) -> tuple[list[MicroBatch], LaneStates]:
            return _pinned(self._own.load(first_sample(step)), self._world), self._stream.states()

        ahead = self._run.data.prefetch_steps
        loaded = prefetched(load, begin, end, ahead) if self._shared.reads else iter(())
        self._behind[begin] = {}

        for step in range(begin, end):

            def read(behind: int = step + 1) -> list[MicroBatch]:
                batches, self._behind[behind] = next(loaded)
                return batches

            size = (self._run.train.micro_batch_size, self._run.data.sequence_length)
            batches = self._shared.share(read, self._numbers, size, documents=self._run.data.reset_attention)
            yield batches if self._shared.reads else _pinned(batches, self._world)

    def stream_state(self, step: int, position: int) -> dict[str, Any] | None:
        of_readers = self._shared.gathered(self._behind[step] if self._shared.reads else None)
        self._behind = {later: states for later, states in self._behind.items() if later >= step}
        return self._stream.on_disk(position, of_readers) if self._world.is_first else None

    def close(self) -> None:
        self._shared.close()


def _pinned(batches: list[MicroBatch], world: World) -> list[MicroBatch]:
    return [batch.pinned() for batch in batches] if world.device.type == "cuda" else batches
