"""Examples in a stream: packed whole as they come, each once an epoch, and a run goes on where it was."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.data.examples import Example, encode_document
from skv_dist.data.lane_state import parse_stream
from skv_dist.data.open import open_data
from skv_dist.data.packing import Sample
from skv_dist.data.stream import TrainingStream
from skv_dist.data.tokenizer import ByteTokenizer
from skv_dist.errors import UserError

NUM_EXAMPLES, LANES, LENGTH = 90, 3, 64
BYTES = ByteTokenizer()


def prompt(number: int) -> str:
    return f"<{number}>" + "?" * (number * 7 % 23)


def response(number: int) -> str:
    return f"[{number}]" + "!" * (number * 5 % 17)


def source(folder: Path, *more: dict[str, str]) -> SourceConfig:
    rows = [*({"q": prompt(number), "a": response(number)} for number in range(NUM_EXAMPLES)), *more]
    for file in range(3):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[file::3]))
    path = str(folder / "*.jsonl")
    return SourceConfig(path=path, format="jsonl", prompt_field="q", response_field="a")


def config(*sources: SourceConfig, **keys: Any) -> DataConfig:
    given = {
        "sequence_length": LENGTH,
        "stream_lanes": LANES,
        "shuffle_buffer": 30,
        "validation_fraction": 0.0,
        "reset_attention": True,
        **keys,
    }
    return DataConfig(sources=list(sources), streaming=True, **given)


def opened(given: DataConfig) -> TrainingStream:
    train, _ = open_data(given, BYTES, 1, lambda: None, micro_batch_size=1, replicas=1)
    assert isinstance(train, TrainingStream)
    return train


def parts(sample: Sample) -> list[tuple[list[int], list[bool]]]:
    """Tokens and marks of the documents of a sample, the last of which may be padding."""
    assert sample.counts is not None
    places = [sample.documents == document for document in range(int(sample.documents.max()) + 1)]
    found = [(sample.tokens[place].tolist(), sample.counts[place].tolist()) for place in places]
    return found if any(found[-1][1]) else found[:-1]


def numbers(samples: list[Sample]) -> Counter[int]:
    texts = [BYTES.decode(ids) for sample in samples for ids, _ in parts(sample)]
    return Counter(int(found) for text in texts for found in re.findall(r"<(\d+)>", text))


@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize("buffer", [0, 30])
def test_each_example_comes_whole_and_once_an_epoch(tmp_path: Path, buffer: int, train_on: str) -> None:
    stream = opened(config(source(tmp_path), shuffle_buffer=buffer, train_on=train_on))
    samples = [stream[position] for position in range(150)]
    found = numbers(samples)
    assert set(found) == set(range(NUM_EXAMPLES))
    assert max(found.values()) - min(found.values()) <= 2  # lanes are not at the same place of an epoch
    for sample in samples:
        assert len(sample.tokens) == len(sample.documents) == LENGTH + 1
        for ids, counts in parts(sample):
            number = int(re.findall(r"<(\d+)>", BYTES.decode(ids))[0])
            right = encode_document(BYTES, Example(prompt(number), response(number)))
            assert right.answer is not None
            assert ids == right.ids.tolist()
            assert counts == (right.answer.tolist() if train_on == "response" else [True] * len(ids))


@pytest.mark.parametrize("length", [64, 200, 1000])
def test_sequences_are_full(tmp_path: Path, length: int) -> None:
    """As they come, one behind the other, examples of 25 tokens fill .8 of 64; a long sequence holds dozens."""
    stream = opened(config(source(tmp_path), sequence_length=length))
    samples = [stream[position] for position in range(40)]
    used = sum(len(ids) for sample in samples for ids, _ in parts(sample))
    assert used / (len(samples) * (length + 1)) > (0.9 if length < 100 else 0.97)


@pytest.mark.parametrize("steps", [0, 1, 8, 40, 77])
def test_a_run_goes_on_bit_by_bit(tmp_path: Path, steps: int) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.jsonl").write_text("".join(json.dumps({"text": "x" * number}) + "\n" for number in range(5, 60)))
    given = config(source(tmp_path), SourceConfig(path=str(texts / "*.jsonl"), format="jsonl"))
    whole, first = opened(given), opened(given)
    expected = [whole[position] for position in range(steps + 40)]
    for position in range(steps):
        first[position]
    state = parse_stream(json.loads(json.dumps(first.on_disk(steps, [first.states()]))))
    second = opened(given)
    assert second.restore(state, steps) == []
    for position in range(steps, steps + 40):
        for mine, right in zip(second[position], expected[position]):
            assert (mine is None) == (right is None)
            assert mine is None or np.array_equal(mine, right)


def test_long_examples_are_cut_left_out_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long, hopeless = {"q": "<700>" + "?" * 80, "a": "[700]"}, {"q": "<800>", "a": "[800]" + "!" * 80}
    given = source(tmp_path, long, hopeless)
    found: dict[str, list[Sample]] = {}
    for too_long in ("cut", "drop"):
        stream = opened(config(given, too_long=too_long))
        found[too_long] = [stream[position] for position in range(100)]
    answers = {
        name: {BYTES.decode(ids)[-5:] for s in samples for ids, _ in parts(s)} for name, samples in found.items()
    }
    assert "[700]" in answers["cut"]
    assert "[700]" not in answers["drop"]
    assert set(range(NUM_EXAMPLES)) == set(numbers(found["drop"]))
    said = capsys.readouterr().out
    assert re.search(r"of the examples read so far \d+ are longer than data\.sequence_length 64 and lost", said)
    stream = opened(config(given, too_long="refuse"))
    with pytest.raises(UserError, match=r"jsonl': row 31 has \d+ tokens, more than data\.sequence_length 64"):
        [stream[position] for position in range(100)]


def test_where_no_example_fits_the_run_ends(tmp_path: Path) -> None:
    stream = opened(config(source(tmp_path), sequence_length=4))
    with pytest.raises(UserError, match=r"all of its examples are longer than data\.sequence_length 4: raise it"):
        stream[0]


def test_a_run_may_go_on_with_shorter_sequences(tmp_path: Path) -> None:
    """What waits was cut for longer ones."""
    first = opened(config(source(tmp_path)))
    for position in range(5):
        first[position]
    state = parse_stream(json.loads(json.dumps(first.on_disk(5, [first.states()]))))
    second = opened(config(source(tmp_path), sequence_length=30))
    second.restore(state, 5)
    assert all(len(second[position].tokens) == 31 for position in range(5, 30))


def test_what_waits_is_checked_when_it_is_read(tmp_path: Path) -> None:
    stream = opened(config(source(tmp_path)))
    stream[0]
    content = json.loads(json.dumps(stream.on_disk(1, [stream.states()])))
    (lane,) = content["sources"][0]["lanes"].values()
    assert lane["lengths"]
    lane["lengths"][0] += 1
    with pytest.raises(ValueError, match="lengths, remaining and answers do not go together"):
        parse_stream(content)
