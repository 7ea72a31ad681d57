"""Values on the command line: as in YAML where that is meant, else to the last character as they stand."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from skv_dist.config.load import load_config
from skv_dist.config.run import RunConfig
from skv_dist.config.yaml_file import parse_override
from skv_dist.errors import UserError
from tests.support.settings import config


def loaded(folder: Path, *overrides: str) -> RunConfig:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config()))
    return load_config(file, overrides)


TEXTS = [
    "a #b",
    "a: b",
    "- a",
    "*a",
    "&a b",
    "!a b",
    "%a",
    "@a",
    "`a",
    "|a",
    "> a",
    "a\tb",
    " a ",
    "it's",
    "#a",
    "--- a",
]
TEXTS += [
    "a\nb",
    "~/a",
    "2026-11-25",
    "2026-11-25 10:00:00",
    "12 #b",
    "true #b",
    "a ",
    "a, b",
    "C:\\a",
    "a]",
    "? a",
    "...",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_kept_to_the_last_character(tmp_path: Path, text: str) -> None:
    assert loaded(tmp_path, f"train.output_dir={text}").train.output_dir == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        (" 3 ", 3),
        ("-1.5", -1.5),
        ("1e-4", 1e-4),
        ("true", True),
        ("null", None),
        ("~", None),
        ('"a #b"', "a #b"),
        ("'3'", "3"),
        ('""', ""),
        ("[1, 0.5]", [1, 0.5]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_what_is_written_as_in_yaml_is_read_so(text: str, value: Any) -> None:
    assert parse_override(text) == value


@pytest.mark.parametrize("text", ["", "  ", "\t"])
def test_an_empty_value_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"override 'train.seed=\s*' has no value: write train.seed=null"):
        loaded(tmp_path, f"train.seed={text}")


@pytest.mark.parametrize("text", ['"a', '"a" #b', "'a' b", "[1, 2", "[1] #b", "{a: 1", "[1] x"])
def test_a_quote_or_bracket_must_be_closed_and_be_the_end(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="not valid YAML: a quote or bracket is not closed, or something follows it"):
        loaded(tmp_path, f"train.output_dir={text}")


def test_what_a_comment_would_have_hidden_is_refused_where_a_number_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"command line: train.seed: .*integer.* \(got '3 #b'\)"):
        loaded(tmp_path, "train.seed=3 #b")


@pytest.mark.parametrize("seed", ["-1", "9223372036854775808", "99999999999999999999"])
def test_a_seed_that_has_no_place_in_64_bits_is_refused(tmp_path: Path, seed: str) -> None:
    with pytest.raises(UserError, match=rf"command line: train.seed: .* \(got {seed}\)"):
        loaded(tmp_path, f"train.seed={seed}")


def test_the_largest_seed_can_be_drawn_from(tmp_path: Path) -> None:
    from skv_dist.routing.draw import DrawKey

    run = loaded(tmp_path, "train.seed=9223372036854775807")
    run.policy().plan(DrawKey(run.train.seed, 0, 0))


def test_a_date_in_a_file_is_text(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config()).replace("output_dir: unused", "output_dir: 2026-11-25"))
    assert load_config(file).train.output_dir == "2026-11-25"
