"""Keys by their path (``data.sources.0.path`` or, of every entry, ``data.sources.path``) in the sections."""

import difflib
from collections.abc import Iterator, Sequence
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from skv_dist.config.run import RunConfig


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a value of ``field`` is, may be, or is a list of; None for plain values."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def section_around(path: Sequence[str | int]) -> type[BaseModel] | None:
    """The section that holds the last key of ``path``; None if there is no such section."""
    section: type[BaseModel] = RunConfig
    for name in _names(path[:-1]):
        field = section.model_fields.get(name)
        nested = None if field is None else section_of(field)
        if nested is None:
            return None
        section = nested
    return section


def field_at(path: Sequence[str | int]) -> FieldInfo | None:
    """The field of the key at ``path``; None if there is no such key, or if ``path`` ends in the index of an entry."""
    section = section_around(path)
    return None if section is None else section.model_fields.get(str(path[-1]))


def unknown_key(path: Sequence[str | int]) -> str:
    """What to say of a key that is none: with the nearest known key, or all that stand beside it."""
    section = section_around(path)
    known = list(section.model_fields) if section else []
    near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
    elsewhere = [key for key in _section_keys() if key.endswith(f".{path[-1]}")]
    if elsewhere:
        hint = f"did you mean {' or '.join(repr(key) for key in elsewhere)}?"
    elif near:
        hint = f"did you mean '{near[0]}'?"
    elif known:
        hint = f"known keys are {', '.join(known)}"
    else:
        hint = f"'{dotted(path[:-1])}' has no keys"
    return f"unknown key '{dotted(path)}': {hint}"


def dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def _names(path: Sequence[str | int]) -> list[str]:
    """The path without the indices of list entries."""
    return [part for part in path if isinstance(part, str) and not part.isdigit()]


def _section_keys() -> Iterator[str]:
    """``section.key`` for every key that stands directly in a section."""
    for name, field in RunConfig.model_fields.items():
        section = section_of(field)
        yield from (f"{name}.{key}" for key in (section.model_fields if section else ()))
