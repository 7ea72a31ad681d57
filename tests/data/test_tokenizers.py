"""Tokenizers from folders: their fingerprint, their size, and where they are found."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.data.token_set import PreparedSet
from skv_dist.data.tokenize import prepare
from skv_dist.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from skv_dist.errors import UserError


def _save(folder: Path, *, eos: str = "<e>", last_id: int = 5, truncate: bool = False, pad: bool = False) -> Path:
    words = {"<e>": 0, "<f>": 1, "<u>": 2, "a": 3, "b": 4, "c": last_id}
    backend = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if truncate:
        backend.enable_truncation(2)
    if pad:
        backend.enable_padding(length=9, pad_id=0, pad_token="<e>")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="<u>").save_pretrained(folder)
    if truncate or pad:  # as it is saved after a call with truncation or padding
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        assert content["truncation" if truncate else "padding"]
    return folder


def _text(folder: Path) -> SourceConfig:
    (folder / "text.txt").write_text("a b c a")
    return SourceConfig(path=str(folder / "text.txt"), format="text")


@pytest.mark.parametrize("setting", ["truncate", "pad"])
def test_truncation_and_padding_are_no_part_of_a_tokenizer(tmp_path: Path, setting: str) -> None:
    folder = _save(tmp_path / "tok", **{setting: True})
    plain = load_tokenizer(str(_save(tmp_path / "plain")))
    tokenizer = load_tokenizer(str(folder))
    before = tokenizer.fingerprint()
    prepare([_text(tmp_path)], tokenizer, tmp_path / "set", progress=False)
    assert tokenizer.fingerprint() == before == plain.fingerprint()
    opened = PreparedSet(tmp_path / "set", load_tokenizer(str(folder)))
    assert opened.tokens.tolist() == [3, 4, 5, 3, 0]


@pytest.mark.parametrize("used_before", [False, True])
def test_sets_with_earlier_fingerprints_open(tmp_path: Path, used_before: bool) -> None:
    folder = _save(tmp_path / "tok", truncate=True)
    prepare([_text(tmp_path)], load_tokenizer(str(folder)), tmp_path / "set", progress=False)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if used_before:  # earlier versions noted the state behind the first text
        backend.no_truncation()
    meta = json.loads((tmp_path / "set" / "meta.json").read_text())
    meta["tokenizer_fingerprint"] = hashlib.sha256(backend.to_str().encode()).hexdigest()[:32]
    (tmp_path / "set" / "meta.json").write_text(json.dumps(meta))
    assert PreparedSet(tmp_path / "set", load_tokenizer(str(folder))).num_documents == 1


def test_the_end_token_is_a_part_of_a_tokenizer(tmp_path: Path) -> None:
    one, other = (load_tokenizer(str(_save(tmp_path / eos[1], eos=eos))) for eos in ("<e>", "<f>"))
    assert (one.end_of_document, other.end_of_document) == (0, 1)
    assert one.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("last_id", [5, 400, 70_000])
def test_the_largest_id_decides_on_the_size(tmp_path: Path, last_id: int) -> None:
    tokenizer = load_tokenizer(str(_save(tmp_path / "tok", last_id=last_id)))
    assert tokenizer.vocab_size == last_id + 1
    prepare([_text(tmp_path)], tokenizer, tmp_path / "set", progress=False)
    assert PreparedSet(tmp_path / "set").tokens.tolist() == [3, 4, last_id, 3, 0]


def test_halves_of_characters_do_not_end_a_run(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(str(_save(tmp_path / "tok")))
    np.testing.assert_array_equal(tokenizer.encode("a \ud800 b"), [3, 2, 4])


def test_a_tokenizer_is_noted_with_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path / "tok")
    monkeypatch.chdir(tmp_path)

    def noted(name: str) -> str:
        source = SourceConfig(path="a", format="text")
        return DataConfig(sequence_length=8, sources=[source], tokenizer=name).tokenizer

    assert noted("./tok") == noted("tok") == noted(str(tmp_path / "tok")) == str(tmp_path / "tok")
    assert (noted("byte"), noted("someone/tokenizer")) == ("byte", "someone/tokenizer")
    assert noted("./nowhere") == "./nowhere"  # refused as it was given


def test_a_copy_is_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(_save(tmp_path / "tok", truncate=True)))
    for name, content in tokenizer.files().items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert load_tokenizer(str(tmp_path / "copy")).fingerprint() == tokenizer.fingerprint()
    assert load_tokenizer("byte").files() == {}


def test_one_that_would_change_in_the_copy_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(_save(tmp_path / "tok")))
    other = _save(tmp_path / "other", last_id=9)
    saved = lambda _, folder: shutil.copytree(other, folder, dirs_exist_ok=True)  # noqa: E731
    monkeypatch.setattr(type(tokenizer.stock), "save_pretrained", saved)
    with pytest.warns(UserWarning, match="not the same once it is saved"):
        assert tokenizer.files() == {}


@pytest.mark.parametrize("name", ["./gone", "runs/start/tokenizer", "here/gone", "gone/", "/nowhere", "~/nowhere"])
def test_a_folder_that_is_missing_is_not_asked_for_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(HuggingFaceTokenizer, "__init__", lambda *_: pytest.fail("it is looked up"))
    with pytest.raises(UserError, match="is not a folder"):
        load_tokenizer(name)
