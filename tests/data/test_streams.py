"""Streams: what is read in an epoch, by whom, and where a run goes on."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.data.batches import micro_batches
from skv_dist.data.lane_state import LaneState, StreamOnDisk, parse_stream
from skv_dist.data.open import open_data
from skv_dist.data.stream import TrainingStream
from skv_dist.data.tokenizer import ByteTokenizer
from skv_dist.errors import UserError

NUM_DOCUMENTS = 120
LANES, LENGTH = 4, 31


def _text(number: int) -> str:
    """With its end as long as a sample, which so holds one document and a token of the next."""
    return f"<{number}>".ljust(LENGTH - 1, ".")


def _write(folder: Path, form: str, files: int = 3) -> str:
    """The documents in so many files of unequal sizes; the format to read them with."""
    folder.mkdir()
    bounds = [0, *(NUM_DOCUMENTS * (i + 1) ** 2 // files**2 for i in range(files))]
    for file, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        rows = [{"text": _text(number)} for number in range(begin, end)]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if form == "jsonl":
            (folder / f"{file}.jsonl").write_bytes(lines)
        elif form == "gzip":
            (folder / f"{file}.jsonl").write_bytes(gzip.compress(lines))
        elif form == "list":
            (folder / f"{file}.json").write_text(json.dumps(rows))
        elif form == "text":
            for number, row in enumerate(rows, begin):
                (folder / f"{number:03}.txt").write_text(row["text"])
        else:  # parquet, alone or as a folder in the form of a dataset
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, folder / f"train-{file}.parquet", row_group_size=7)
    return {"gzip": "jsonl", "list": "jsonl"}.get(form, form)


@pytest.fixture(params=["jsonl", "gzip", "list", "text", "parquet", "hub"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> SourceConfig:
    folder = tmp_path / "source"
    return SourceConfig(path=str(folder), format=_write(folder, request.param))


def _config(*sources: SourceConfig, **keys: Any) -> DataConfig:
    given = {"sequence_length": LENGTH, "stream_lanes": LANES, "shuffle_buffer": 20, "validation_fraction": 0.0}
    return DataConfig(sources=list(sources), streaming=True, **{**given, **keys})


def _open(config: DataConfig, size: int = 1, replicas: int = 1) -> TrainingStream:
    train, _ = open_data(config, ByteTokenizer(), 1, lambda: None, micro_batch_size=size, replicas=replicas)
    assert isinstance(train, TrainingStream)
    return train


class Run:
    """A run that reads a stream: steps of one global batch over some replicas, each with a reader of its own."""

    def __init__(
        self,
        config: DataConfig,
        state: StreamOnDisk | None = None,
        *,
        replicas: int = 1,
        size: int = 1,
        number: int = 4,
    ) -> None:
        self.size, self.number, self.replicas = size, number, replicas
        self.position = 0 if state is None else state.position
        self._streams = [_open(config, size, replicas) for _ in range(replicas)]
        self.anew, *_ = [stream.restore(state, self.position) for stream in self._streams]

    def step(self) -> list[bytes]:
        """The samples of a global batch, in their order."""
        found = {}
        for replica, stream in enumerate(self._streams):
            local = self.number // self.replicas
            for batch in micro_batches(stream, self.position, local, self.size, replica, self.replicas, False):
                found[batch.index] = [sample.numpy().tobytes() for sample in batch.tokens]
        self.position += self.size * self.number
        return [sample for index in sorted(found) for sample in found[index]]

    def state(self) -> StreamOnDisk:
        """As a checkpoint would hold it."""
        content = self._streams[0].on_disk(self.position, [stream.states() for stream in self._streams])
        return parse_stream(json.loads(json.dumps(content)))


def _numbers(samples: list[bytes]) -> Counter[int]:
    texts = [ByteTokenizer().decode(np.frombuffer(sample, np.int64).tolist()) for sample in samples]
    return Counter(int(found) for text in texts for found in re.findall(r"<(\d+)>", text))


@pytest.mark.parametrize("buffer", [0, 20])
def test_an_epoch_has_each_document_once(source: SourceConfig, buffer: int) -> None:
    """Lanes end an epoch within a few documents of each other, so two epochs are counted."""
    run = Run(_config(source, shuffle_buffer=buffer))
    samples = [sample for _ in range(2 * NUM_DOCUMENTS // 4) for sample in run.step()]
    found = _numbers(samples)
    assert set(found) == set(range(NUM_DOCUMENTS))
    assert max(found.values()) <= 3
    assert sum(found.values()) == 2 * NUM_DOCUMENTS
    assert samples == [s for r in [Run(_config(source, shuffle_buffer=buffer))] for _ in range(60) for s in r.step()]


def test_an_epoch_of_the_lanes_together_is_exact(source: SourceConfig) -> None:
    """By what the lanes say of themselves: whatever is read before a lane's second epoch is its share."""
    (lanes,) = _open(_config(source))._sources
    found: Counter[int] = Counter()
    for lane in range(LANES):
        texts = []
        lanes.take(lane, LaneState())
        reader = lanes._lanes[lane]._reader
        for part in reader.parts(0, lane):
            texts += [str(one.document) for _, one in reader.documents(part, None, lanes._lanes[lane]._count)]
        found.update(int(number) for text in texts for number in re.findall(r"<(\d+)>", text))
        assert len(texts) < NUM_DOCUMENTS / 2  # shares are about equal, although files are not
    assert found == Counter(range(NUM_DOCUMENTS))


@pytest.mark.parametrize("steps", [0, 1, 7, 29, 30, 31, 45])
def test_a_run_goes_on_bit_by_bit(source: SourceConfig, steps: int) -> None:
    config = _config(source, sequence_length=45)  # documents are cut
    whole, first = Run(config, number=6), Run(config, number=6)  # steps begin with another lane in turn
    expected = [whole.step() for _ in range(steps + 20)]
    assert [first.step() for _ in range(steps)] == expected[:steps]
    state = first.state()
    for replicas in (1, 2):  # another number of them reads the same
        second = Run(config, state, replicas=replicas, number=6)
        assert second.anew == []
        assert [second.step() for _ in range(20)] == expected[steps:]


def test_replicas_read_the_samples_of_one_process(source: SourceConfig) -> None:
    config = _config(source)
    runs = [Run(config, replicas=replicas) for replicas in (1, 2, 4)]
    for _ in range(40):
        one, two, four = (run.step() for run in runs)
        assert one == two == four
    assert runs[0].state() == runs[1].state() == runs[2].state()


def test_batches_and_sequences_may_change(tmp_path: Path) -> None:
    """Nothing is read twice, nothing is left out: only the order changes."""
    folder = tmp_path / "source"
    config = _config(SourceConfig(path=str(folder), format=_write(folder, "jsonl")))
    first = Run(config)
    samples = [sample for _ in range(9) for sample in first.step()]
    second = Run(config, first.state(), size=2, number=2)
    samples += [sample for _ in range(6) for sample in second.step()]
    longer = Run(_config(*config.sources, sequence_length=2 * LENGTH), second.state(), number=8)
    samples += [sample for _ in range(4) for sample in longer.step()]
    found = _numbers(samples)
    assert sum(found.values()) == 9 * 4 + 6 * 4 + 4 * 8 * 2 == NUM_DOCUMENTS + 4
    assert len(found) >= NUM_DOCUMENTS - 8  # the last ones of some lanes, where others began their second epoch
    again = [number for number, times in found.items() if times > 1]
    assert len(again) <= 12


def test_a_source_that_has_changed_begins_anew_and_others_go_on(tmp_path: Path) -> None:
    sources = []
    for name in ("a", "b"):
        folder = tmp_path / name
        sources.append(SourceConfig(path=str(folder), format=_write(folder, "jsonl")))
    config = _config(*sources)
    run = Run(config)
    before = [run.step() for _ in range(10)]
    state = run.state()
    (tmp_path / "b" / "more.jsonl").write_text(json.dumps({"text": _text(999)}) + "\n")
    second = Run(config, state)
    assert second.anew == [str(tmp_path / "b")]
    assert second.step() != before[0]


def test_what_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    (folder / "one.txt").write_text("one")
    with pytest.raises(UserError, match=r"has 1 files, each of them one document, for data\.stream_lanes 4"):
        _open(_config(SourceConfig(path=str(folder), format="text")))


def test_a_lane_without_documents_of_its_own_takes_those_of_others(tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"text": _text(number)}) + "\n" for number in range(2)))
    run = Run(_config(SourceConfig(path=str(file), format="jsonl")))
    assert set(_numbers([sample for _ in range(6) for sample in run.step()])) == {0, 1}


def test_a_stream_without_any_document_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "none.jsonl"
    file.write_text("\n\n")
    with pytest.raises(UserError, match="an epoch has no document"):
        Run(_config(SourceConfig(path=str(file), format="jsonl"))).step()


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"lanes": 0},
        {"position": -1},
        {"sources": 1},
        {"sources": [{"order": "x", "lanes": {"one": {}}}]},
        {"sources": [{"order": "x", "lanes": {"0": {"epoch": -1}}}]},
    ],
)
def test_a_damaged_state_is_no_state(change: dict[str, Any]) -> None:
    whole = {"format": 1, "lanes": 4, "position": 0, "next_lane": 0, "sources": []}
    assert parse_stream(whole).lanes == 4
    with pytest.raises(ValueError, match=r"\w"):
        parse_stream({**whole, **change})
