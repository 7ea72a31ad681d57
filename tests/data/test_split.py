"""What is held out, and in which order samples come: by content, not by place."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.data.continuing import check_goes_on, data_state
from skv_dist.data.examples import text_hash
from skv_dist.data.open import open_data
from skv_dist.data.split import SplitRule, is_held_out, rule_of
from skv_dist.data.token_set import PreparedSet
from skv_dist.data.tokenize import prepare
from skv_dist.data.tokenizer import ByteTokenizer
from skv_dist.errors import UserError

NUM_DOCUMENTS = 120


def _write(folder: Path, documents: int = NUM_DOCUMENTS) -> SourceConfig:
    folder.mkdir(parents=True)
    for shard in range(12):  # more than streams once shuffled together
        rows = [{"text": f"<{i}>" * 20} for i in range(shard, documents, 12)]
        (folder / f"{shard:02}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(folder), format="jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a prepared set ``set``, the same at another place, and one without hashes, as earlier versions made."""
    made = tmp_path_factory.mktemp("split")
    source = _write(made / "raw")
    prepare([source], ByteTokenizer(), made / "set", progress=False)
    shutil.copytree(made / "set", made / "elsewhere" / "set2")
    shutil.copytree(made / "set", made / "old")
    _forget_hashes(made / "old")
    shutil.copytree(made / "old", made / "elsewhere" / "old2")
    return made


def _forget_hashes(prepared: Path) -> None:
    meta = json.loads((prepared / "meta.json").read_text())
    del meta["content"]
    (prepared / "meta.json").write_text(json.dumps(meta))
    (prepared / "documents.hash").unlink()


def _open(path: Path, seed: int = 1, rule: SplitRule = SplitRule.CONTENT, **keys: Any) -> Any:
    given: dict[str, Any] = {"format": "prepared", "validation_fraction": 0.2, "validation_needed": True, **keys}
    needed = given.pop("validation_needed")
    sources = [SourceConfig(path=str(path), format=given.pop("format"))] * given.pop("times", 1)
    config = DataConfig(sequence_length=32, sources=sources, cache_dir=str(path.parent / "cache"), **given)
    return open_data(config, ByteTokenizer(), seed, lambda: None, rule=rule, validation_needed=needed)


def _samples(samples: Any, number: int = 60) -> list[bytes]:
    return [samples[i].tokens.tobytes() for i in range(number)]


def _documents(samples: Any, number: int) -> set[int]:
    """Numbers of the documents that some samples hold."""
    texts = (ByteTokenizer().decode(samples[position].tokens.tolist()) for position in range(number))
    return {int(found) for text in texts for found in re.findall(r"<(\d+)>", text)}


@pytest.mark.parametrize("pair", [("set", "elsewhere/set2"), ("old", "elsewhere/old2")])
@pytest.mark.parametrize("split", ["document", "sequence"])
def test_data_may_move(folder: Path, pair: tuple[str, str], split: str) -> None:
    here, there = (_open(folder / name, validation_split=split) for name in pair)
    assert _samples(here[0]) == _samples(there[0])
    assert _samples(here[1]) == _samples(there[1])


@pytest.mark.parametrize("split", ["document", "sequence"])
def test_seeds_are_compared_on_the_same_text(folder: Path, split: str) -> None:
    one, other = _open(folder / "set", validation_split=split), _open(folder / "set", 2, validation_split=split)
    assert _samples(one[1]) == _samples(other[1])
    assert _samples(one[0]) != _samples(other[0])
    third = _open(folder / "set", validation_split=split, split_seed=5)
    assert _samples(one[1]) != _samples(third[1])


def test_streamed_and_prepared_hold_out_the_same_documents_in_every_epoch(folder: Path) -> None:
    held_out = {i for i in range(NUM_DOCUMENTS) if _is_held_out(f"<{i}>" * 20)}
    assert 10 < len(held_out) < 40
    prepared_train, prepared_validation = _open(folder / "set")
    assert _documents(prepared_validation, len(prepared_validation._sets[0])) <= held_out
    train, validation = _open(folder / "raw", format="jsonl", streaming=True, shuffle_buffer=7)
    three_epochs = 3 * len(prepared_train._sets[0])
    seen = _documents(train, three_epochs)
    assert not seen & held_out
    assert len(seen) > 0.9 * (NUM_DOCUMENTS - len(held_out))
    assert _documents(validation, three_epochs // 3) <= held_out


def _is_held_out(text: str) -> bool:
    return bool(is_held_out(np.array([text_hash(text)], np.uint64), 0.2, 0)[0])


def test_an_epoch_of_a_stream_has_each_document_once(folder: Path) -> None:
    def read(number: int, **keys: Any) -> list[bytes]:
        train, _ = _open(folder / "raw", format="jsonl", streaming=True, validation_fraction=0.0, **keys)
        return _samples(train, number)

    num_samples = (PreparedSet(folder / "set").tokens.size - 1) // 32
    ordered, shuffled = read(num_samples, shuffle_buffer=0), read(num_samples, shuffle_buffer=10)
    assert ordered != shuffled == read(num_samples, shuffle_buffer=10)

    train, _ = _open(folder / "raw", format="jsonl", streaming=True, validation_fraction=0.0, shuffle_buffer=10)
    assert len(_documents(train, num_samples)) >= NUM_DOCUMENTS - 1


def test_copies_of_a_document_stand_on_one_side(tmp_path: Path) -> None:
    source = _write(tmp_path / "raw")
    prepare([source, source], ByteTokenizer(), tmp_path / "twice", progress=False)
    train, validation = _open(tmp_path / "twice")
    numbers = [_documents(part, len(part._sets[0])) for part in (train, validation)]
    assert not numbers[0] & numbers[1]
    assert len(numbers[0] | numbers[1]) == NUM_DOCUMENTS
    train, validation = _open(tmp_path / "twice", times=2)
    assert _samples(train._sets[0]) != _samples(train._sets[1])  # shuffled apart
    assert train._sets[0]._windows.num_tokens == train._sets[1]._windows.num_tokens  # but split alike


def test_checkpoints_of_before_go_on_as_before(folder: Path) -> None:
    assert rule_of({}, _config()) == SplitRule.PATH
    assert rule_of({}, _config(), ["data.split_seed"]) == SplitRule.CONTENT
    assert rule_of({"data": {"rule": "path"}}, _config()) == SplitRule.PATH
    assert rule_of({"data": {"rule": "content"}}, _config(streaming=True)) == SplitRule.CONTENT
    with pytest.raises(UserError, match="streamed its data in the order of an earlier version"):
        rule_of({}, _config(streaming=True))
    with pytest.raises(UserError, match="'newer', which this version does not know"):
        rule_of({"data": {"rule": "newer"}}, _config())
    here = _open(folder / "set", rule=SplitRule.PATH)
    assert _samples(here[0]) != _samples(_open(folder / "elsewhere" / "set2", rule=SplitRule.PATH)[0])
    assert _samples(here[1]) != _samples(_open(folder / "set", 2, rule=SplitRule.PATH)[1])


def test_the_old_rule_is_what_it_was() -> None:
    """Numbers of version 0.1: a change of them changes runs that go on."""
    from skv_dist.data.split import _held_out_by_path

    assert np.flatnonzero(_held_out_by_path(60, 0.1, 1234, "runs/a")).tolist() == OLD_NUMBERS


OLD_NUMBERS = [8, 10, 13, 25, 31, 34, 40, 42]


def _config(**keys: Any) -> DataConfig:
    return DataConfig(sequence_length=32, sources=[SourceConfig(path="a", format="text")], **keys)


def test_missing_hashes_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "set", tmp_path / "set")
    (tmp_path / "set" / "documents.hash").write_bytes(b"x")
    with pytest.raises(UserError, match=r"documents\.hash has 1 bytes instead of 960"):
        PreparedSet(tmp_path / "set")
    (tmp_path / "set" / "documents.hash").unlink()
    with pytest.raises(UserError, match=r"documents\.hash is missing"):
        PreparedSet(tmp_path / "set")


def test_an_empty_validation_part_that_nobody_needs_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("training text " * 30)
    seed = next(seed for seed in range(99) if not _document_held_out(tmp_path, seed))
    with pytest.raises(UserError, match=r"validation part \(0 of 1 documents\) holds no sequence"):
        _open(tmp_path / "a.txt", format="text", split_seed=seed)
    train, validation = _open(tmp_path / "a.txt", format="text", split_seed=seed, validation_needed=False)
    assert validation is None
    assert len(train._sets[0]) == 13


def _document_held_out(folder: Path, seed: int) -> bool:
    hashes = np.array([text_hash((folder / "a.txt").read_text())], np.uint64)
    return bool(is_held_out(hashes, 0.2, seed)[0])


def test_a_run_goes_on_with_the_same_text_only(folder: Path, tmp_path: Path) -> None:
    config = _config()
    train, _ = _open(folder / "set")
    state = {"step": 5, "data": data_state(SplitRule.CONTENT, train, None)}

    def check(state: dict[str, Any], now: DataConfig, samples: Any, allowed: list[str]) -> None:
        check_goes_on(state, config, now, samples, None, allowed, has_stream=False)

    check(state, config, _open(folder / "elsewhere" / "set2")[0], [])
    check({"step": 5}, config, train, [])  # of an earlier version: nothing was noted
    prepare([_write(tmp_path / "raw", 60)], ByteTokenizer(), tmp_path / "less", progress=False)
    less, _ = _open(tmp_path / "less")
    with pytest.raises(UserError, match="content of data source 'a' has changed"):
        check(state, config, less, [])
    check(state, config, less, ["data.sources"])
    longer = config.model_copy(update={"sequence_length": 64})
    with pytest.raises(UserError, match=r"data\.sequence_length was 32 and is 64.*checkpoint\.init_from"):
        check(state, longer, train, ["data.sequence_length"])
