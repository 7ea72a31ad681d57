"""Order, packing, prepared sets and what each replica reads."""

from pathlib import Path

import numpy as np
import pytest

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.data.batches import micro_batches
from skv_dist.data.open import open_data
from skv_dist.data.order import blended, shuffled
from skv_dist.data.token_set import PreparedSet
from skv_dist.data.tokenize import prepare
from skv_dist.data.tokenizer import ByteTokenizer
from skv_dist.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_shuffle_is_a_permutation(size: int) -> None:
    order = [shuffled(i, size, 5) for i in range(size)]
    assert sorted(order) == list(range(size))
    if size > 100:
        assert order != [shuffled(i, size, 6) for i in range(size)]
        assert order != [shuffled(i, size, 5, epoch=1) for i in range(size)]


def test_blend_honours_weights_without_repeats_or_gaps() -> None:
    places = [blended(i, [3.0, 1.0], 2) for i in range(8192)]
    for source, share in ((0, 0.75), (1, 0.25)):
        within = [p for s, p in places if s == source]
        assert len(within) == round(share * 8192)
        assert sorted(within) == list(range(len(within)))


def test_byte_tokenizer_has_the_ids_of_byt5() -> None:
    tokenizer = ByteTokenizer()
    text = "def f():\n    return 'é€𝄞'\n"
    assert tokenizer.encode(text).tolist() == [b + 3 for b in text.encode()]
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def _source(tmp_path: Path, documents: int = 60) -> SourceConfig:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(documents):
        (folder / f"{i:03}.txt").write_text(f"document {i} " * (i + 1))
    return SourceConfig(path=str(folder), format="text")


def _data(tmp_path: Path, source: SourceConfig, **keys: object) -> DataConfig:
    return DataConfig(
        sequence_length=32, sources=[source], cache_dir=str(tmp_path / "cache"), validation_fraction=0.1, **keys
    )


def _open(config: DataConfig) -> tuple[object, object]:
    return open_data(config, ByteTokenizer(), 1, lambda: None)


def test_replicas_share_the_samples_of_one_process(tmp_path: Path) -> None:
    config = _data(tmp_path, _source(tmp_path))

    def read(replicas: int) -> dict[int, np.ndarray]:
        found = {}
        for replica in range(replicas):
            train, _ = _open(config)
            for batch in micro_batches(train, 16, 4 // replicas, 2, replica, replicas, False):
                found[batch.index] = batch.tokens.numpy()
        return found

    one, two = read(1), read(2)
    assert one.keys() == two.keys() == {0, 1, 2, 3}
    for index in one:
        np.testing.assert_array_equal(one[index], two[index])


def test_every_window_once_an_epoch_and_validation_apart(tmp_path: Path) -> None:
    source = _source(tmp_path)
    train, validation = _open(_data(tmp_path, source))
    windows = train._sets[0]
    seen = {windows[i].tokens.tobytes() for i in range(len(windows))}
    held = validation._sets[0]
    assert len(windows) > 300
    assert len(held) > 10
    assert len({windows[len(windows) + i].tokens.tobytes() for i in range(len(windows))} - seen) == 0


def test_documents_are_marked(tmp_path: Path) -> None:
    train, _ = _open(_data(tmp_path, _source(tmp_path), reset_attention=True))
    for position in range(50):
        sample = train[position]
        ends = sample.tokens[:-1] == ByteTokenizer.end_of_document
        np.testing.assert_array_equal(np.diff(sample.documents) == 1, ends)


def test_bad_input_is_named(tmp_path: Path) -> None:
    source = _source(tmp_path, 3)
    out = tmp_path / "set"
    prepare([source], ByteTokenizer(), out, progress=False)
    with pytest.raises(UserError, match="exists already"):
        prepare([source], ByteTokenizer(), out, progress=False)
    broken = tmp_path / "a.parquet"
    broken.write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"a\.parquet"):
        prepare([SourceConfig(path=str(broken), format="parquet")], ByteTokenizer(), tmp_path / "x", progress=False)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(UserError, match=r"no text|cannot be read"):
        prepare([SourceConfig(path=str(empty), format="text")], ByteTokenizer(), tmp_path / "x", progress=False)
    with pytest.raises(UserError, match="no file matches"):
        prepare([SourceConfig(path=str(tmp_path / "no*"), format="text")], ByteTokenizer(), tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "empty.txt", "set", "text"]

    class Other(ByteTokenizer):
        def fingerprint(self) -> str:
            return "other"

    with pytest.raises(UserError, match="made with tokenizer"):
        PreparedSet(out, Other())
    (out / "tokens.bin").write_bytes(b"xx")
    with pytest.raises(UserError, match=r"tokens\.bin has 2 bytes"):
        PreparedSet(out, ByteTokenizer())


def test_a_sequence_longer_than_the_data_is_refused(tmp_path: Path) -> None:
    config = _data(tmp_path, _source(tmp_path, 3)).model_copy(update={"sequence_length": 10**6})
    with pytest.raises(UserError, match="holds no sequence"):
        _open(config)
