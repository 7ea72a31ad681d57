"""Sets in Megatron's own format: read, written, trained on, and refused."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from skv_dist.commands import maps, prepare_data
from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.data.megatron_set import MegatronSet, export
from skv_dist.data.open import open_data
from skv_dist.data.tokenize import prepare
from skv_dist.data.tokenizer import ByteTokenizer
from skv_dist.errors import UserError
from tests.support.jobs.loop import run_training
from tests.support.runs import write_text
from tests.support.settings import run_settings

tokenizer = ByteTokenizer()
END = tokenizer.end_of_document
DOCUMENTS = [[[5, 6, 7], [8, END]], [[9, END]], [[10, 11], [12], [13, END]]]  # sentences, of which documents are made


def write(prefix: Path, documents: list[list[list[int]]] = DOCUMENTS, dtype: type[np.number] = np.uint16) -> Path:
    """As Megatron's own tools do with --split-sentences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sentences in documents:
        for sentence in sentences:
            builder.add_item(torch.tensor(sentence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def data(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["skv-data", *map(str, arguments)])
    return prepare_data.main()


def samples_of(config: DataConfig) -> list[list[int]]:
    train, _ = open_data(config, tokenizer, 0, lambda: None)
    return [train[position].tokens.tolist() for position in range(train.num_sequences)]  # type: ignore[union-attr]


def config_of(*sources: SourceConfig, **given: Any) -> DataConfig:
    return DataConfig(sequence_length=4, sources=list(sources), **{"validation_fraction": 0.0, **given})


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_documents_are_those_of_the_index(tmp_path: Path, suffix: str, dtype: type[np.number]) -> None:
    tokens = MegatronSet(f"{write(tmp_path / 'a.b', dtype=dtype)}{suffix}", tokenizer)
    found = [tokens.read(*tokens.offsets[place : place + 2]).tolist() for place in range(tokens.num_documents)]
    assert found == [list(chain(*sentences)) for sentences in DOCUMENTS]


def test_documents_are_laid_end_to_end(tmp_path: Path) -> None:
    source = SourceConfig(path=str(write(tmp_path / "set")), format="megatron")
    every = list(chain(*chain(*DOCUMENTS)))
    assert sorted(samples_of(config_of(source))) == sorted([every[0:5], every[4:9]])


def test_a_prepared_set_is_written_for_megatron(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.dumps({"text": f"{number} times {number} is {number * number}."}) for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    raw = SourceConfig(path=str(tmp_path / "rows.jsonl"), format="jsonl")
    prepare([raw], tokenizer, tmp_path / "set", progress=False)
    assert data(monkeypatch, "export", tmp_path / "set", tmp_path / "out") == 0
    assert "40 documents" in capsys.readouterr().out
    theirs = IndexedDataset(str(tmp_path / "out"))  # what Megatron reads
    assert [tokenizer.decode(ids[:-1].tolist()) for ids in theirs] == [json.loads(row)["text"] for row in rows]
    assert all(ids[-1] == END for ids in theirs)
    prepared, exported = (
        config_of(SourceConfig(path=str(tmp_path / name), format=kind))
        for name, kind in (("set", "prepared"), ("out", "megatron"))
    )
    assert sorted(samples_of(exported)) == sorted(samples_of(prepared))
    assert not capsys.readouterr().out
    assert data(monkeypatch, "export", tmp_path / "set", tmp_path / "out.bin") == 2
    assert "out.bin exists: choose another name" in capsys.readouterr().err


def test_examples_are_not_written_for_megatron(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "what", "a": "that"}))
    raw = SourceConfig(path=str(tmp_path / "rows.jsonl"), format="jsonl", prompt_field="q", response_field="a")
    prepare([raw], tokenizer, tmp_path / "set", progress=False)
    assert data(monkeypatch, "export", tmp_path / "set", tmp_path / "out") == 2
    assert "holds examples: Megatron's format cannot say which" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "set"]


def test_what_has_no_end_tokens_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MegatronSet(str(write(tmp_path / "set", [[[1, 2]], [[3, END]], [[4]]])), tokenizer)
    assert "2 of 3 documents looked at do not end with token" in capsys.readouterr().out


def test_a_blend_is_trained_on_and_a_run_goes_on(workers: Any, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    write_text(text)
    draw = np.random.default_rng(0)
    documents = [[[*draw.integers(0, 200, 60).tolist(), END]] for _ in range(60)]
    sources = [
        {"path": str(write(tmp_path / "set", documents)), "format": "megatron", "weight": 2},
        {"path": str(text), "format": "text"},
    ]

    def run(out: Path, steps: int) -> list[dict[str, Any]]:
        keys = {"sources": sources, "cache_dir": str(tmp_path / "cache")}
        given = {"checkpoint": {"every": 2}, "data": keys, "train": {"steps": steps}}
        return workers(1)(run_training, run_settings(text, out, **given, optimizer={"schedule": "constant"}))[0]

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    parts = run(tmp_path / "parts", 4)
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole[-len(parts) :]]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_evaluations_take_such_a_set(tmp_path: Path, suffix: str) -> None:
    source = SourceConfig(path=f"{write(tmp_path / 'set')}{suffix}", format="megatron")
    keys = maps._data_overrides([source.path], config_of(source))
    assert any("megatron" in key for key in keys if key.startswith("data.sources="))


@pytest.mark.parametrize("path", [".", "..", "/"])
def test_a_folder_is_no_prefix(path: str) -> None:
    with pytest.raises(UserError, match=r"there is no file .*\.bin; path is what both names begin with"):
        MegatronSet(path, tokenizer)
    with pytest.raises(UserError, match=r"is a folder: name what both files begin with, such as .*set"):
        export(Path("set"), Path(path))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda prefix: prefix.with_suffix(".idx").unlink(), r"there is no file .*set\.idx; path is what both"),
        (lambda prefix: prefix.with_suffix(".idx").write_bytes(b"MMID"), r"set\.idx is no index of a text, or damaged"),
        (lambda prefix: prefix.with_suffix(".bin").write_bytes(b"1234"), r"set\.bin has 4 bytes, set\.idx says"),
        (
            lambda prefix: write(prefix, [[[300] * 9]]),
            "is 300, but the tokenizer has 259: was the set made with another",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, spoil: Any, message: str) -> None:
    prefix = write(tmp_path / "set")
    spoil(prefix)
    with pytest.raises(UserError, match=message):
        samples_of(config_of(SourceConfig(path=str(prefix), format="megatron")))
