"""YAML and command-line overrides to a `RunConfig`, with errors that name the file, the line and the key."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from skv_dist.config.keys import dotted, field_at, unknown_key
from skv_dist.config.run import RunConfig
from skv_dist.config.yaml_file import KeyPath, Lines, dump, parse_override, read_file
from skv_dist.errors import UserError


def load_config(file: str | Path, overrides: Sequence[str] = (), *, alone: bool = False) -> RunConfig:
    """Read and check a run configuration.

    Args:
        file: a YAML file; its optional top-level ``base`` names files (relative to it) to start from.
        overrides: ``section.key=value`` strings, the value as `parse_override` reads it; list entries by index
            (``data.sources.0.path``).
        alone: refuse ``base``: a file that was written by a run holds everything, and must not have others read.

    Raises:
        UserError: naming file and line, key, and the cure where there is one.
    """
    lines: Lines = {}
    values = read_file(Path(file), lines, alone=alone)
    for override in overrides:
        _apply_override(values, override)
    given = [override.partition("=")[0] for override in overrides]
    if (path := _unwritable(values, ())) is not None:
        raise UserError(
            f"{_place(path, lines, given)}: {dotted(path)}: it holds a character that no text or name of a file can"
        )
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_first_error(error, lines, given)) from error


def _unwritable(value: Any, path: KeyPath) -> KeyPath | None:
    """The key of a text with NUL, which ends a name of a file, or half a character, which no UTF-8 can say."""
    if isinstance(value, str):
        return path if re.search("[\0\ud800-\udfff]", value) else None
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (_unwritable(child, (*path, key)) for key, child in children)
    return next((wrong for wrong in found if wrong is not None), None)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, every key present."""
    return dump(config.model_dump(mode="json"))


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set one key of ``values``; sections on the way to it that are not there are made."""
    key, separator, text = override.partition("=")
    if not separator or "." not in key:
        raise UserError(f"override '{override}' is not of the form section.key=value")
    if not text.strip():
        raise UserError(f"override '{override}' has no value: write {key}=null or {key}='\"\"' if you mean so")
    try:
        value = parse_override(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"override '{override}': the value is not valid YAML: a quote or bracket is not closed, or something "
            "follows it"
        ) from error
    *parents, last = key.split(".")
    container: Any = values
    for depth, name in enumerate(parents, 1):
        if _is_index(name, container):
            container = container[int(name)]
        elif isinstance(container, dict):
            if container.get(name) is None:
                container[name] = {}
            container = container[name]
        else:
            raise UserError(f"override '{override}': '{dotted(parents[:depth])}' does not exist")
    if _is_index(last, container):
        container[int(last)] = value
    elif isinstance(container, dict):
        container[last] = value
    else:
        raise UserError(f"override '{override}': '{dotted(parents)}' has no key '{last}'")


def _is_index(name: str, container: Any) -> bool:
    """Whether ``name`` is the index of an entry that a list has."""
    return isinstance(container, list) and name.isascii() and name.isdigit() and int(name[:9]) < len(container)


def _first_error(error: ValidationError, lines: Lines, overridden: Sequence[str]) -> str:
    """The first error as one line: place, key, what is wrong, and the nearest known key for a typo."""
    first = error.errors(include_url=False)[0]
    path = tuple(first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{_place(path, lines, overridden)}: {unknown_key(path)}"
    if first["type"] == "missing":
        return f"{_place(path, lines, overridden)}: key '{dotted(path)}' is missing"
    # Behind a union, pydantic appends the name of the branch it tried: cut what is no key.
    while path and not isinstance(path[-1], int) and field_at(path) is None:
        path = path[:-1]
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    suffix = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return f"{_place(path, lines, overridden)}: {dotted(path)}: {message}{suffix}"


def _place(path: KeyPath, lines: Lines, overridden: Sequence[str]) -> str:
    """Where the key at ``path``, or the nearest one around it that stands in a file, was given."""
    key = dotted(path)
    if any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in overridden):
        return "command line"
    ancestors = (path[:length] for length in range(len(path), -1, -1))
    return next((lines[ancestor] for ancestor in ancestors if ancestor in lines), "configuration")
