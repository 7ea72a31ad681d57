"""Streaming: raw documents tokenized while training, by a fixed number of lanes.

A lane (`skv_dist.data.lane`) is a reader with a share of the text, and serves every ``stream_lanes``-th micro-batch.
Lanes are dealt out to the replicas, so another number of replicas changes who reads, not what is read; and the place
of each lane is a part of the checkpoint, so that a run that goes on reads nothing twice and leaves nothing out.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.data.lane import Lane, LaneReader, LaneSettings
from skv_dist.data.lane_state import LaneState, StreamOnDisk
from skv_dist.data.order import blended
from skv_dist.data.packing import Sample
from skv_dist.data.row_documents import document_of_row
from skv_dist.data.skipped import Skipped
from skv_dist.data.stream_files import Listing, StreamFiles
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.data.waiting_examples import Fitting

LaneStates = Mapping[tuple[int, int], LaneState]  # by source and lane


class StreamSource:
    """The lanes of one source in this process.

    Args:
        config: the section; ``sources`` of it are not looked at.
        seed: of the order of files and documents.
        held_out: whether the documents that are held out are taken, or the others; None: all.
        lanes: that it is dealt out to.
        block: documents of a lane among which the next one is drawn; 0: files and documents come in their order.
        num_lanes_here: lanes that this process reads.
    """

    def __init__(
        self,
        source: SourceConfig,
        listing: Listing,
        config: DataConfig,
        tokenizer: Tokenizer,
        seed: int,
        *,
        held_out: bool | None,
        lanes: int,
        block: int,
        num_lanes_here: int,
    ) -> None:
        self.path, self.content = source.path, listing.content
        of_row = document_of_row(source)
        self._reader = LaneReader(
            StreamFiles(source, listing, of_row.fields, config.cache_dir),
            of_row,
            tokenizer,
            Skipped(source.path, config.max_skipped, streaming=True),
            LaneSettings(
                path=source.path,
                lanes=lanes,
                seed=seed,
                block=block,
                fitting=Fitting(config.sequence_length, config.too_long, config.train_on == "response"),
                held_out=held_out,
                fraction=config.validation_fraction,
                split_seed=config.split_seed,
            ),
            self._note_epoch,
            holds_examples=source.holds_examples,
        )
        self._lanes: dict[int, Lane] = {}
        self._num_lanes_here = num_lanes_here
        self._ended: set[int] = set()  # lanes that have come to the end of their share
        identity = [listing.content, seed, lanes, block, *of_row.fields]
        self.order = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]

    def take(self, lane: int, start: LaneState) -> Sample:
        """The next sample of a lane, which goes on from ``start`` where it has not begun yet."""
        if lane not in self._lanes:
            self._lanes[lane] = Lane(self._reader, lane, start)
        return self._lanes[lane].take()

    @property
    def states(self) -> dict[int, LaneState]:
        """Of the lanes that have begun here."""
        return {number: lane.state for number, lane in self._lanes.items()}

    def _note_epoch(self, lane: int, epoch: int) -> None:
        """Once all lanes of this process are through, what was skipped can be judged, and is said once."""
        self._ended.add(lane)
        if epoch != 1 or len(self._ended) != self._num_lanes_here:
            return
        reports = [self._reader.skipped.report(), self._reader.too_long_report()]
        for report in reports if os.environ.get("RANK", "0") == "0" else []:
            if report is not None:
                print(report, flush=True)


class TrainingStream:
    """The samples of a run by their positions, which are asked for in ascending order.

    Args:
        micro_batch_size: ``train.micro_batch_size``.

    Attributes:
        contents: what tells the files of each source from other files (`Listing.content`).
        names: of the sources, in the order of `Sample.source`.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        weights: Sequence[float],
        seed: int,
        lanes: int,
        micro_batch_size: int,
        names: Sequence[str],
    ) -> None:
        self.contents, self.names = [source.content for source in sources], names
        self._sources, self._weights, self._seed = sources, weights, seed
        self._lanes, self._micro_batch_size = lanes, micro_batch_size
        self._first_position = self._first_lane = 0
        self._started: dict[tuple[int, int], LaneState] = {}

    def __getitem__(self, position: int) -> Sample:
        """Raises UserError where the text cannot be read."""
        lane = self._lane_of(position)
        source, _ = blended(position, self._weights, self._seed)
        sample = self._sources[source].take(lane, self._started.get((source, lane), LaneState()))
        return sample._replace(source=source)

    def _lane_of(self, position: int) -> int:
        """Whole micro-batches take turns at the lanes, so that a lane is read by one replica alone."""
        return (self._first_lane + (position - self._first_position) // self._micro_batch_size) % self._lanes

    def restore(self, state: StreamOnDisk | None, position: int, *, keep_tokens: bool = True) -> list[str]:
        """Go on at sample ``position`` where ``state`` was taken.

        Args:
            state: None: all text is read from its beginning.
            keep_tokens: whether the tokens that are left of cut documents are those of today's tokenizer; else these
                documents lose their rest, and examples that waited for room are left out.

        Returns:
            The paths of sources that are read from their beginning, as they are not those of ``state`` or come in
            another order.
        """
        self._first_position, self._first_lane = position, 0
        if state is not None and state.lanes == self._lanes:
            self._first_lane = state.next_lane % self._lanes
        anew = []
        for number, source in enumerate(self._sources):
            before = state.sources[number] if state is not None and number < len(state.sources) else None
            if before is None or before.order != source.order:
                anew.append(source.path)
                continue
            for lane, on_disk in before.lanes.items():
                state_of_lane = on_disk.state()
                self._started[number, int(lane)] = state_of_lane if keep_tokens else state_of_lane.without_tokens
        return anew

    def states(self) -> LaneStates:
        """Where the lanes are that this process has read, behind the samples that were asked for."""
        return {
            (number, lane): state
            for number, source in enumerate(self._sources)
            for lane, state in source.states.items()
        }

    def on_disk(self, position: int, of_processes: Sequence[LaneStates]) -> dict[str, Any]:
        """What a checkpoint keeps, behind sample ``position``.

        Args:
            of_processes: `states` of all processes that read. Lanes that none of them has read are where they were.
        """
        states = dict(self._started)
        for of_process in of_processes:
            states.update(of_process)
        sources = [
            {
                "order": source.order,
                "lanes": {str(lane): states[of, lane].to_json() for of, lane in sorted(states) if of == number},
            }
            for number, source in enumerate(self._sources)
        ]
        lane = self._lane_of(position)
        return {"format": 1, "lanes": self._lanes, "position": position, "next_lane": lane, "sources": sources}


class HeldOutStream:
    """The first held-out samples, which every reader walks alike; a position behind the last begins anew.

    One lane reads each source, so that no text is evaluated on twice before all of it was.

    Attributes:
        contents, names: as of `TrainingStream`.
    """

    def __init__(
        self, make: Callable[[], Sequence[StreamSource]], weights: Sequence[float], seed: int, names: Sequence[str]
    ) -> None:
        self._make, self._sources = make, make()
        self.contents, self.names = [source.content for source in self._sources], names
        self._weights, self._seed = weights, seed
        self._next = 0
        self._last: Sample | None = None

    def __getitem__(self, position: int) -> Sample:
        """Raises UserError where the text cannot be read, or nothing of it is held out."""
        if self._last is not None and position == self._next - 1:
            return self._last
        if position < self._next:
            self._sources, self._next = self._make(), 0
        while self._next <= position:
            source, _ = blended(self._next, self._weights, self._seed)
            self._last = self._sources[source].take(0, LaneState())._replace(source=source)
            self._next += 1
        assert self._last is not None
        return self._last
