"""YAML and command-line overrides to a `RunConfig`, with errors that name the file, the line and the key."""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError

Lines = dict[tuple[str | int, ...], str]  # key path -> "file:line"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a float, so that 1e-4 is a number, and no repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)?\.?\d[\d_]*[eE][-+]?\d+$|^[-+]?\d+\.\d*$|^[-+]?\.\d+$"),
    list("-+0123456789."),
)


def _record_lines(node: yaml.Node, path: tuple[str | int, ...], file: Path, lines: Lines) -> None:
    lines[path] = f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            _record_lines(value_node, (*path, str(key_node.value)), file, lines)
            lines[(*path, str(key_node.value))] = f"{file}:{key_node.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _record_lines(child, (*path, index), file, lines)


def _read(file: Path, lines: Lines, ancestors: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file on top of the files that its ``base`` names (paths relative to it)."""
    if file in ancestors:
        raise UserError(f"{file}: 'base' leads back to itself")
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise UserError(f"cannot read configuration {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict) or node is None:
        raise UserError(f"{file}: a configuration is a mapping of sections (model, data, train, ...)")
    base = values.pop("base", [])
    merged: dict[str, Any] = {}
    for name in [base] if isinstance(base, str) else base:
        merged = merge(merged, _read(file.parent / str(name), lines, (*ancestors, file)))
    _record_lines(node, (), file, lines)
    return merge(merged, values)


def merge(under: Any, over: Any) -> Any:
    """``over`` laid on ``under``: mappings are joined key by key, everything else is replaced."""
    if isinstance(under, dict) and isinstance(over, dict):
        return {**under, **{key: merge(under.get(key), value) for key, value in over.items()}}
    return over


def _apply_override(values: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator or "." not in key:
        raise UserError(f"override '{text}' is not of the form section.key=value")
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"override '{text}': the value is not valid YAML") from error
    *parents, last = key.split(".")
    place: Any = values
    for index, part in enumerate(parents):
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict):
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        else:
            raise UserError(f"override '{text}': '{'.'.join(parents[: index + 1])}' does not exist")
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise UserError(f"override '{text}': '{'.'.join(parents)}' has no key '{last}'")


def _section_at(path: Sequence[str | int]) -> type[BaseModel] | None:
    """The section class that holds the key at ``path`` (its parent), through lists and optionals."""
    current: Any = RunConfig
    for part in path[:-1]:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        if field is None:
            return None
        candidates = [field.annotation, *get_args(field.annotation)]
        current = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if current is None:
            return None
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _is_key(path: Sequence[str | int]) -> bool:
    section = _section_at(path)
    return section is not None and path[-1] in section.model_fields


def _explain(error: ValidationError, lines: Lines, overridden: Iterable[str]) -> str:
    """The first error as one line: place, key, what is wrong, and the nearest known key for a typo."""
    first = error.errors(include_url=False)[0]
    path = tuple(first["loc"])
    if first["type"] not in ("extra_forbidden", "missing"):
        # Behind a union, pydantic appends the name of the branch it tried: cut what is no key.
        while path and not isinstance(path[-1], int) and not _is_key(path):
            path = path[:-1]
    key = ".".join(str(part) for part in path)
    place = next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), "configuration")
    if any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in overridden):
        place = "command line"
    if first["type"] == "extra_forbidden":
        section = _section_at(path)
        known = list(section.model_fields) if section else []
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        hint = f": did you mean '{near[0]}'?" if near else f": known keys are {', '.join(known)}"
        return f"{place}: unknown key '{key}'{hint}"
    if first["type"] == "missing":
        return f"{place}: key '{key}' is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {key}: {message}" + (
        f" (got {first['input']!r})" if isinstance(first["input"], (str, int, float, bool)) else ""
    )


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run configuration.

    Args:
        file: a YAML file; its optional top-level ``base`` names files (relative to it) to start from.
        overrides: ``section.key=value`` strings, the value in YAML; list entries by index (``data.sources.0.path``).

    Raises:
        UserError: naming file and line, key, and the cure where there is one.
    """
    lines: Lines = {}
    values = _read(Path(file), lines)
    for override in overrides:
        _apply_override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, lines, [o.partition("=")[0] for o in overrides])) from error


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, every key present."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
