"""Configuration files: their YAML, the files they are based on, and the line where each key stands."""

import re
from pathlib import Path
from typing import Any

import yaml

from skv_dist.errors import UserError

_OPENING = ("'", '"', "[", "{")

KeyPath = tuple[str | int, ...]
Lines = dict[KeyPath, str]  # key path -> "file:line"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a float, so that 1e-4 is a number, no dates, as no key is one, and no repeated keys."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

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


def parse_override(text: str) -> Any:
    """The value of a command-line override: numbers, booleans, null, quoted text, [lists] and {mappings} as in YAML.

    Any other text is taken as it stands, to the last character: YAML would cut ``a #b`` at the comment, make a mapping
    of ``a: b`` and an alias of ``*a``.

    Raises:
        yaml.YAMLError: a quote or bracket is not closed, or something follows it.
    """
    stripped = text.strip()
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        if stripped.startswith(_OPENING):
            raise
        return text
    whole = node is not None and text[node.start_mark.index : node.end_mark.index] == stripped
    if stripped.startswith(_OPENING):
        if not whole:
            raise yaml.YAMLError("something follows the closing quote or bracket")
        return yaml.load(text, Loader=_Loader)
    is_word = isinstance(node, yaml.ScalarNode) and whole and not stripped.startswith(("&", "!", "|", ">"))
    value = yaml.load(text, Loader=_Loader) if is_word else text
    return text if isinstance(value, str) else value


def read_file(file: Path, lines: Lines, ancestors: tuple[Path, ...] = (), *, alone: bool = False) -> dict[str, Any]:
    """One file, laid on the files that its ``base`` names (paths relative to it).

    Args:
        lines: gets the place of each key.
        ancestors: the files whose ``base`` led here.
        alone: refuse ``base``.

    Raises:
        UserError: a file cannot be read, or is no mapping in YAML.
    """
    if file in ancestors:
        raise UserError(f"{file}: 'base' leads back to itself")
    values, node = _parse(file)
    if alone and "base" in values:
        raise UserError(f"{file}: 'base' is for files that are written by hand: this one must not name others")
    base = values.pop("base", [])
    merged: dict[str, Any] = {}
    for name in [base] if isinstance(base, str) else base:
        merged = merge(merged, read_file(file.parent / str(name), lines, (*ancestors, file)))
    _record_lines(node, (), file, lines)  # last, as the values of this file win
    return merge(merged, values)


def _parse(file: Path) -> tuple[dict[str, Any], yaml.Node]:
    """The values of one file, and the nodes that know their lines."""
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
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise UserError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict) or node is None:
        raise UserError(f"{file}: a configuration is a mapping of sections (model, data, train, ...)")
    return values, node


def _record_lines(node: yaml.Node, path: KeyPath, file: Path, lines: Lines) -> None:
    lines[path] = f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key_path = (*path, str(key_node.value))
            _record_lines(value_node, key_path, file, lines)
            lines[key_path] = f"{file}:{key_node.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _record_lines(child, (*path, index), file, lines)


def merge(under: Any, over: Any) -> Any:
    """``over`` laid on ``under``: mappings are joined key by key, everything else is replaced."""
    if isinstance(under, dict) and isinstance(over, dict):
        return {**under, **{key: merge(under.get(key), value) for key, value in over.items()}}
    return over
