"""Makes configs/reference.yaml, a configuration that names every key with its meaning.

python -m skv_dist.config.reference > configs/reference.yaml     # write it
python -m skv_dist.config.reference --check configs/reference.yaml
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from skv_dist.config.keys import section_of
from skv_dist.config.run import RunConfig
from skv_dist.config.words import BASE_MEANING, in_yaml, meaning, type_in_words, wrapped

_WIDTH = 120
COMMAND = "python -m skv_dist.config.reference > configs/reference.yaml"
_HEADER = (
    "Every key of a run, with its meaning. Behind a key stands its type. Keys without a default are marked (required) "
    "and show an example, as do those marked (an example); all others show their default: a configuration names what "
    "differs.",
    "On the command line keys are changed by skv-train FILE train.steps=100 data.sources.0.path=x, and explained by "
    "skv-train --explain train.steps.",
    BASE_MEANING,
    f"Made from the docstrings in skv_dist/config: {COMMAND}",
)


def reference() -> str:
    """The content of configs/reference.yaml."""
    header = "\n#\n".join("\n".join(_comment(paragraph)) for paragraph in _HEADER)
    sections = ("\n".join(lines) for lines in _keys(RunConfig, indent=""))
    return "\n\n".join([header, *sections]) + "\n"


def _keys(section: type[BaseModel], indent: str) -> Iterator[list[str]]:
    """For each key of a section the lines that explain and set it; ``indent`` stands before each line."""
    for name, field in section.model_fields.items():
        yield [*_comment(meaning(field), indent), *_setting(name, field, indent)]


def _setting(name: str, field: FieldInfo, indent: str) -> list[str]:
    section = section_of(field)
    if field.annotation is section and section is not None:
        return [f"{indent}{name}:", *_section_body(section, indent + "  ")]
    need = "(required) " if field.is_required() else "(an example) " if field.examples else ""
    need_and_type = f"{need}{type_in_words(field)}"
    if section is not None and field.is_required():
        return [f"{indent}{name}:  # {need_and_type}", *_list_entry(section, indent + "  ")]
    value = field.examples[0] if field.examples else field.default
    setting = f"{indent}{name}: {in_yaml(value)}"
    if len(f"{setting}  # {need_and_type}") > _WIDTH:
        return [*_comment(need_and_type, indent), setting]
    line = f"{setting}  # {need_and_type}"
    return [line, *_mapping_in_comment(name, section, indent)] if section and value is None else [line]


def _section_body(section: type[BaseModel], indent: str) -> list[str]:
    """The keys of a section, with an empty line between them."""
    lines = [line for block in _keys(section, indent) for line in ("", *block)]
    return lines[1:]


def _list_entry(section: type[BaseModel], indent: str) -> list[str]:
    """An entry of a list; ``- `` stands before its first key, which comes behind the comment on it."""
    lines = [line for block in _keys(section, indent + "  ") for line in block]
    first_key = next(index for index, line in enumerate(lines) if not line.lstrip().startswith("#"))
    lines[first_key] = f"{indent}- {lines[first_key].lstrip()}"
    return lines


def _mapping_in_comment(name: str, section: type[BaseModel], indent: str) -> list[str]:
    """What a mapping that is absent by default would look like."""
    lines = [f"{indent}#", *_comment(section.__doc__ or "", indent), f"{indent}# {name}:"]
    return lines + [line for block in _keys(section, indent + "#   ") for line in block]


def _comment(text: str, indent: str = "") -> list[str]:
    return [f"{indent}# {line}" for line in wrapped(text, _WIDTH - len(f"{indent}# "))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints a configuration that names every key with its meaning.")
    parser.add_argument("--check", type=Path, metavar="FILE", help="say whether FILE is up to date instead of printing")
    file: Path | None = parser.parse_args().check
    if file is None:
        print(reference(), end="")
    elif file.read_text(encoding="utf-8") != reference():
        raise SystemExit(f"{file} is stale: run {COMMAND}")


if __name__ == "__main__":
    main()
