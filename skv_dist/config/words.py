"""What a key is, in words: its meaning, type and default, from the section's field."""

import re
import textwrap
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from skv_dist.config.keys import section_of

# The one key of a file that no section knows (`skv_dist.config.yaml_file`).
BASE_MEANING = (
    "A file may start from others: the key base names one, or a list of them, by paths relative to the file. A later "
    "one wins over an earlier one, and the file's own keys win over all; lists are replaced as a whole."
)
_NOUNS = {int: "integer", float: "number", str: "text"}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def meaning(field: FieldInfo) -> str:
    """The docstring below the field or, of a section that has none there, that of its class."""
    section = section_of(field)
    return field.description or (section.__doc__ if section is not None else None) or ""


def first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def wrapped(text: str, width: int) -> list[str]:
    """Lines of ``text``, whose paragraphs stand between blank lines; lines that begin with "- " are items of a list."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n|\n\s*(?=- )", text.strip()):
        indent = "  " if paragraph.startswith("- ") else ""
        one_line = " ".join(paragraph.split())
        lines += textwrap.wrap(one_line, width, subsequent_indent=indent, break_on_hyphens=False)
    return lines


def type_in_words(field: FieldInfo) -> str:
    """For example ``integer above 0, or null``."""
    return _type_in_words(field.annotation, field.metadata)


def default_in_words(field: FieldInfo) -> str:
    """``required``, with an example where the field has one, or else the default as it stands in a file."""
    if field.is_required():
        return f"required, for example {in_yaml(field.examples[0])}" if field.examples else "required"
    if isinstance(field.default, BaseModel):
        return "every key has one"
    return in_yaml(field.default)


def in_yaml(value: Any) -> str:
    """A value as it stands behind a key, in one line."""
    text = yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("...\n").strip()


def _type_in_words(annotation: Any, metadata: Sequence[Any], plural: str = "") -> str:
    """``metadata`` holds the bounds; ``plural`` is the ending of a noun that stands for several values."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_in_words(arguments[0], arguments[1].metadata, plural)
    if origin in (Union, UnionType):
        return ", or ".join(_type_in_words(argument, metadata, plural) for argument in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is list:
        nonempty = any(getattr(bound, "min_length", 0) for bound in metadata)
        return f"list of {_type_in_words(arguments[0], (), 's')}{', at least one' if nonempty else ''}"
    if origin is tuple:
        return f"[{', '.join(_type_in_words(argument, ()) for argument in arguments)}]"
    if annotation is NoneType:
        return "null"
    if annotation is bool:
        return "true | false"
    if issubclass(annotation, BaseModel):
        return f"mapping{plural}"
    return f"{_NOUNS[annotation]}{plural}{_bounds(metadata)}"


def _bounds(metadata: Sequence[Any]) -> str:
    limits = {name: getattr(bound, name) for bound in metadata for name in _BOUNDS if hasattr(bound, name)}
    if limits.keys() == {"ge", "le"}:
        return f" from {limits['ge']:g} to {limits['le']:g}"
    phrases = [f"{_BOUNDS[name]} {limit if isinstance(limit, int) else f'{limit:g}'}" for name, limit in limits.items()]
    return f" {' and '.join(phrases)}" if phrases else ""
