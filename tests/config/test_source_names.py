"""The names under which metrics.jsonl has the losses of data sources."""

import pytest

from skv_dist.config.data import SourceConfig
from skv_dist.config.source_names import source_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/data/wiki.jsonl.zst", "/data/code/*.txt", "runs/quickstart/stdlib"], ["wiki", "code", "stdlib"]),
        (["/a/wiki/train.jsonl", "/a/code/train.jsonl", "/a/books"], ["wiki-train", "code-train", "books"]),
        (["shards/**/train-v1.5", "a/train"], ["train-v1.5", "train"]),
        (["/x/a/train", "/y/a/train"], ["x-a-train", "y-a-train"]),
        (["/a/w", "/a/w", "/a/w"], ["a-w", "a-w-2", "a-w-3"]),
        (["w", "w", "w-2"], ["w", "w-3", "w-2"]),
        (["w", "a/w"], ["w", "a-w"]),
        (["*.txt", "."], ["data", "data-2"]),
        (["~/my texts: é"], ["my_texts_é"]),
    ],
    ids=str,
)
def test_names_are_short_and_tell_sources_apart(paths: list[str], names: list[str]) -> None:
    assert source_names([SourceConfig(path=path, format="text") for path in paths]) == names


def test_a_hub_dataset_is_named_with_its_configuration() -> None:
    sources = [SourceConfig(path="org/encyclopedia", format="hub", name=name) for name in (None, "2023.en", "2023.de")]
    assert source_names(sources) == ["encyclopedia", "encyclopedia-2023.en", "encyclopedia-2023.de"]
