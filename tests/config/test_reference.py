"""configs/reference.yaml, and the docstrings that it is made from."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from skv_dist.config import reference
from skv_dist.config.data import SourceConfig
from skv_dist.config.keys import field_at, section_of
from skv_dist.config.load import load_config
from skv_dist.config.model import RopeScaling
from skv_dist.config.run import RunConfig
from skv_dist.config.words import first_sentence, meaning, wrapped

REFERENCE = Path(__file__).parents[2] / "configs" / "reference.yaml"


def fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its field, those of nested sections included."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        nested = section_of(field)
        if nested is not None:
            yield from fields(nested, f"{prefix}{name}.")


FIELDS = dict(fields())


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The reference as it would be written now: one test alone speaks of the committed one."""
    file = tmp_path / "reference.yaml"
    file.write_text(reference.reference(), encoding="utf-8")
    return file


def test_the_reference_is_up_to_date() -> None:
    if REFERENCE.read_text(encoding="utf-8") != reference.reference():
        pytest.fail(f"configs/reference.yaml is stale: run {reference.COMMAND}", pytrace=False)


def test_a_stale_file_is_named_with_the_cure(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["reference", "--check", str(made)])
    reference.main()
    made.write_text(made.read_text(encoding="utf-8").replace("num_layers: 8", "num_layers: 9"), encoding="utf-8")
    with pytest.raises(
        SystemExit, match=rf"^{re.escape(str(made))} is stale: run python -m skv_dist\.config\.reference > \S+$"
    ):
        reference.main()


def test_it_loads_with_every_key_at_its_default_or_example(made: Path) -> None:
    text = made.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    values = yaml.safe_load(text)
    assert list(values) == list(RunConfig.model_fields)
    assert list(values["data"]["sources"][0]) == list(SourceConfig.model_fields)
    run = load_config(made)
    for name in RunConfig.model_fields:
        section = getattr(run, name)
        assert list(values[name]) == list(type(section).model_fields)
        check_values(section)
    check_values(run.data.sources[0])


def check_values(section: BaseModel) -> None:
    for name, field in type(section).model_fields.items():
        if field.examples:
            assert getattr(section, name) == field.examples[0], name
        elif not field.is_required():
            assert getattr(section, name) == field.default, name


def test_what_is_required_says_so() -> None:
    text = reference.reference()
    plain = {key: field for key, field in FIELDS.items() if field.annotation is not section_of(field)}
    marked = re.findall(r"^[ #-]*(\w+):.*# \(required\) ", text, re.MULTILINE)
    shown = [key.split(".")[-1] for key, field in plain.items() if field.is_required() and "validation" not in key]
    assert marked == shown


def test_a_mapping_in_a_comment_is_one() -> None:
    (block,) = re.findall(r"^  # rope_scaling:\n(?:  # .*\n)+", reference.reference(), re.MULTILINE)
    values = yaml.safe_load(block.replace("  # ", "", 1).replace("\n  # ", "\n"))
    assert list(values["rope_scaling"]) == list(RopeScaling.model_fields)
    RopeScaling(**values["rope_scaling"])


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_is_described(key: str) -> None:
    text = meaning(FIELDS[key])
    assert text, f"{key} has no docstring"
    section = section_of(FIELDS[key])
    assert section is None or section.__doc__, f"{section} has no docstring"
    assert text[0].isupper(), f"{key}: {text}"
    assert text.endswith("."), f"{key}: {text}"
    assert len(first_sentence(text)) <= 110, f"{key}: its first sentence stands in lists and is too long for them"
    if FIELDS[key].is_required() and section is None:
        assert FIELDS[key].examples, f"{key} is required and has no example"


@pytest.mark.parametrize("key", FIELDS)
def test_descriptions_name_only_what_there_is(key: str) -> None:
    text = meaning(FIELDS[key])
    sections = "|".join(RunConfig.model_fields)
    for named in re.findall(rf"(?<![\w/.])(?:{sections})\.[a-z_]+", text):
        assert field_at(named.split(".")) is not None, f"the description of {key} names {named}"
    values = get_args(FIELDS[key].annotation) if get_origin(FIELDS[key].annotation) is Literal else ()
    listed = re.findall(r"^- (\w+):", text, re.MULTILINE)
    if values and listed:
        assert listed == [str(value) for value in values], key


def test_lists_of_values_are_not_run_together() -> None:
    text = "One\n  sentence of words.\n\n- a: first of\n  two lines.\n- b: second."
    assert wrapped(text, 16) == ["One sentence of", "words.", "- a: first of", "  two lines.", "- b: second."]
