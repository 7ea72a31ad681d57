"""Prompts and chats: what is an answer, what shares a sequence, and which predictions count."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.data.batches import collate
from skv_dist.data.example_packing import pack
from skv_dist.data.examples import Example, encode_document
from skv_dist.data.open import open_data
from skv_dist.data.packing import Sample
from skv_dist.data.token_set import PreparedSet
from skv_dist.data.tokenize import prepare
from skv_dist.data.tokenizer import ByteTokenizer
from skv_dist.errors import UserError

BYTES = ByteTokenizer()
LENGTH = 32


class WithBegin(ByteTokenizer):
    """As those of Llama, which put a token before each text."""

    begin_of_document = 2


def rows() -> list[dict[str, str]]:
    """Examples of 5 to 27 tokens."""
    return [{"q": f"{i:03d}" + "?" * (i % 7), "a": "!" * (1 + i % 16)} for i in range(60)]


def written(folder: Path, lines: list[dict[str, Any]]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def source(file: Path, **keys: Any) -> SourceConfig:
    return SourceConfig(path=str(file), format="jsonl", **{"prompt_field": "q", "response_field": "a", **keys})


def data_config(folder: Path, *sources: SourceConfig, **keys: Any) -> DataConfig:
    given = {"sequence_length": LENGTH, "reset_attention": True, "validation_fraction": 0, **keys}
    return DataConfig(sources=list(sources), cache_dir=str(folder / "cache"), **given)


def epoch(config: DataConfig, num_sequences: int, tokenizer: ByteTokenizer = BYTES) -> list[Sample]:
    train, _ = open_data(config, tokenizer, 0, lambda: None)
    return [train[position] for position in range(num_sequences)]


def sequences_of(config: DataConfig, tokenizer: ByteTokenizer = BYTES) -> list[Sample]:
    """Those of one epoch."""
    train, _ = open_data(config, tokenizer, 0, lambda: None)
    return [train[position] for position in range(len(train._sets[0]))]  # type: ignore[attr-defined, arg-type]


def said(sample: Sample) -> list[tuple[str, str]]:
    """(whole text, text of the tokens that count) of each example in a sequence."""
    assert sample.counts is not None
    texts = []
    for document in range(int(sample.documents.max()) + 1):
        own = sample.documents == document
        texts.append(
            (BYTES.decode(sample.tokens[own].tolist()), BYTES.decode(sample.tokens[own & sample.counts].tolist()))
        )
    return [(whole, counted) for whole, counted in texts if whole]


def test_the_response_and_its_end_are_the_answer() -> None:
    ids, _, answer = encode_document(BYTES, Example("ab", "cde"))
    assert answer is not None
    assert ids.tolist() == [*BYTES.encode("abcde"), BYTES.end_of_document]
    assert answer.tolist() == [False, False, True, True, True, True]


def test_a_text_begins_as_its_tokenizer_wants_it() -> None:
    assert encode_document(WithBegin(), "ab").ids.tolist() == [2, *BYTES.encode("ab"), 1]
    ids, _, answer = encode_document(WithBegin(), Example("a", "b"))
    assert answer is not None
    assert ids.tolist() == [2, *BYTES.encode("ab"), 1]
    assert answer.tolist() == [False, False, True, True]


def test_a_set_whose_texts_begin_otherwise_is_other_data(tmp_path: Path) -> None:
    made = []
    for name, tokenizer in (("plain", BYTES), ("with", WithBegin())):
        prepare([source(written(tmp_path, rows()))], tokenizer, tmp_path / name, progress=False)
        made.append(PreparedSet(tmp_path / name, tokenizer))
    assert made[0].content != made[1].content
    assert made[0].hashes is not None
    assert np.array_equal(made[0].hashes, made[1].hashes)  # the same ones are held out


def test_each_example_comes_whole_and_once_an_epoch(tmp_path: Path) -> None:
    config = data_config(tmp_path, source(written(tmp_path, rows())))
    samples = sequences_of(config)
    assert all(len(sample.tokens) == LENGTH + 1 for sample in samples)
    found = sorted(pair for sample in samples for pair in said(sample))
    assert found == sorted((row["q"] + row["a"], row["a"]) for row in rows())
    assert sum(len(said(sample)) > 1 for sample in samples) > 10


def test_only_predictions_of_answers_count(tmp_path: Path) -> None:
    config = data_config(tmp_path, source(written(tmp_path, rows())))
    samples = sequences_of(config)
    batch = collate(0, samples, reset_attention=True)
    counted = int(batch.loss_mask.sum())
    assert counted == sum(len(row["a"]) + 1 for row in rows())
    labels = batch.labels[batch.loss_mask.bool()].tolist()
    answers = "".join(row["a"] for row in rows())
    assert BYTES.decode(labels) == answers
    assert labels.count(BYTES.end_of_document) == len(rows())
    assert batch.documents is not None
    # The first token of an answer is predicted at the last token of its prompt.
    first = (batch.loss_mask[:, 1:] > batch.loss_mask[:, :-1]).nonzero()
    before = batch.tokens[first[:, 0], first[:, 1] + 1]
    assert {BYTES.decode([token]) for token in before.tolist()} <= set("0123456789?")


def test_prompts_count_too_where_all_is_trained_on(tmp_path: Path) -> None:
    config = data_config(tmp_path, source(written(tmp_path, rows())), train_on="all")
    batch = collate(0, sequences_of(config), reset_attention=True)
    # All but the first token of each example, which nothing is before.
    assert int(batch.loss_mask.sum()) == sum(len(row["q"] + row["a"]) for row in rows())


def test_items_are_packed_without_loss() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    bins = pack(lengths, 50)
    assert sorted(np.concatenate(bins).tolist()) == list(range(500))
    assert max(int(lengths[items].sum()) for items in bins) <= 50
    assert len(bins) <= 1.06 * lengths.sum() / 50


LONG = [{"q": "abcdefghij" * 5, "a": "yes"}, {"q": "short", "a": "no"}, {"q": "x", "a": "y" * 60}]


def test_a_prompt_that_is_too_long_loses_its_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = data_config(tmp_path, source(written(tmp_path, LONG)))
    found = sorted(pair for sample in sequences_of(config) for pair in said(sample))
    whole = ("abcdefghij" * 5 + "yes")[-LENGTH:]  # and the end token: LENGTH + 1 tokens
    assert found == sorted([(whole, "yes"), ("shortno", "no")])
    assert "of 3 examples 1 are longer than data.sequence_length 32" in (printed := capsys.readouterr().out)
    assert "1 were left out" in printed


def test_a_cut_prompt_begins_as_its_tokenizer_wants_it(tmp_path: Path) -> None:
    config = data_config(tmp_path, source(written(tmp_path, LONG[:1])))
    (sample,) = sequences_of(config, WithBegin())
    assert sample.tokens[0] == 2
    assert BYTES.decode(sample.tokens.tolist()) == ("abcdefghij" * 5 + "yes")[-LENGTH + 1 :]


def test_long_examples_are_dropped_or_refused_on_request(tmp_path: Path) -> None:
    file = written(tmp_path, LONG)
    dropped = sequences_of(data_config(tmp_path, source(file), too_long="drop"))
    assert [pair for sample in dropped for pair in said(sample)] == [("shortno", "no")]
    with pytest.raises(
        UserError, match=r"rows.jsonl': 2 of 3 examples are longer .* the first \(number 1\) has 54 tok"
    ):
        sequences_of(data_config(tmp_path, source(file), too_long="refuse"))


def test_held_out_examples_do_not_depend_on_the_sequence_length(tmp_path: Path) -> None:
    file = written(tmp_path, rows())
    parts = []
    for length in (32, 64):
        config = data_config(tmp_path, source(file), validation_fraction=0.3, sequence_length=length)
        both = open_data(config, BYTES, 0, lambda: None)
        parts.append(
            [
                sorted(pair for i in range(len(part._sets[0])) for pair in said(part[i]))
                for part in both  # type: ignore
            ]
        )
    assert parts[0] == parts[1]
    assert len(parts[0][1]) > 5
    assert sorted(parts[0][0] + parts[0][1]) == sorted((row["q"] + row["a"], row["a"]) for row in rows())


def test_texts_and_examples_mix(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "words " * 20}) + "\n" for _ in range(30)))
    examples = source(written(tmp_path, rows()))
    config = data_config(tmp_path, examples, SourceConfig(path=str(text), format="jsonl"))
    samples = epoch(config, 40)
    kinds = {sample.counts is None for sample in samples}
    assert kinds == {True, False}
    batch = collate(0, samples, reset_attention=True)
    for row, sample in enumerate(samples):
        if sample.counts is None:
            same = sample.documents[1:] == sample.documents[:-1]
            assert batch.loss_mask[row].tolist() == same.astype(float).tolist()


def test_templates_make_a_prompt_of_several_fields(tmp_path: Path) -> None:
    file = written(tmp_path, [{"c": "Once.", "q": "Who?", "answers": ["Ted", "Fred"]}])
    made = source(file, prompt_field="{c}\n{{Q}}: {q}", response_field=" {answers}")
    (sample,) = sequences_of(data_config(tmp_path, made))
    assert said(sample) == [("Once.\n{Q}: Who? Ted", " Ted")]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt_field": "{c"}, r"prompt_field '\{c' cannot be read: expected '}'"),
        ({"prompt_field": "{}"}, r"prompt_field '\{\}': \{\} holds no name of a field"),
        ({"prompt_field": "{c.__class__}"}, r"\{c.__class__\} holds no name of a field"),
        ({"prompt_field": "{c!r:>10}"}, r"holds no name of a field"),
        ({"prompt_field": "{nothing}"}, r"no row has a field 'nothing' or 'a': set prompt_field and response_field"),
        ({"prompt_field": "n"}, r"rows.jsonl': row 1: field 'n' is int, not text"),
    ],
)
def test_a_bad_template_is_refused_by_name(tmp_path: Path, keys: dict[str, str], message: str) -> None:
    file = written(tmp_path, [{"c": "x", "q": "y", "a": "z", "n": 3}])
    with pytest.raises(UserError, match=message):
        sequences_of(data_config(tmp_path, source(file, **keys)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"response_field": None}, "prompt_field and response_field are given together"),
        ({"messages_field": "m"}, "a row is a prompt or a chat"),
        ({"format": "text"}, "format 'text' has no fields, so prompt_field means nothing: use jsonl or parquet"),
        ({"format": "prepared"}, "format 'prepared' has no fields, so prompt_field means nothing: give it to skv-data"),
    ],
)
def test_a_source_is_of_one_kind(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig.model_validate(
            {"path": "x", "format": "jsonl", "prompt_field": "q", "response_field": "a", **keys}
        )


def test_examples_need_attention_of_their_own(tmp_path: Path) -> None:
    file = written(tmp_path, rows())
    with pytest.raises(ValueError, match=r"attend to themselves alone: set data\.reset_attention: true"):
        data_config(tmp_path, source(file), reset_attention=False)
    prepare([source(file)], BYTES, tmp_path / "set", progress=False)
    prepared = SourceConfig(path=str(tmp_path / "set"), format="prepared")
    with pytest.raises(UserError, match=r"set' holds examples, .*: set data.reset_attention: true"):
        sequences_of(data_config(tmp_path, prepared, reset_attention=False))
    assert len(sequences_of(data_config(tmp_path, prepared))) == len(sequences_of(data_config(tmp_path, source(file))))


def test_a_set_of_examples_is_whole(tmp_path: Path) -> None:
    prepare([source(written(tmp_path, rows()))], BYTES, tmp_path / "set", progress=False)
    answers = tmp_path / "set" / "tokens.answer"
    assert PreparedSet(tmp_path / "set", BYTES).answers is not None
    answers.write_bytes(answers.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"set: tokens.answer has \d+ bytes instead of \d+"):
        PreparedSet(tmp_path / "set", BYTES)
    answers.unlink()
    with pytest.raises(UserError, match=r"set: tokens\.answer is missing"):
        PreparedSet(tmp_path / "set", BYTES)


def test_two_workers_prepare_the_same_examples(tmp_path: Path) -> None:
    file = written(tmp_path, rows() * 3)
    for workers in (1, 2):
        prepare([source(file)], BYTES, tmp_path / str(workers), workers=workers, progress=False)
    for name in ("tokens.bin", "tokens.answer", "documents.hash"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
