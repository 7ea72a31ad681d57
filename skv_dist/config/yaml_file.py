"""Configuration files: their YAML, the files they are based on, and the line where each key stands."""

import re
from pathlib import Path
from typing import Any

import yaml

from skv_dist.errors import UserError

_OPENING = ("'", '"', "[", "{")

KeyPath = tuple[str | int, ...]
Lines = dict[KeyPath, str]  # key path -> "file:line"


# Scalars of YAML 1.2 (its core schema). PyYAML follows 1.1, to which 010 is eight, 12:30 is 750 and `no` is false: here
# they are text, as they stand, and the section decides what its key takes.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9]\d*)|0o[0-7]+|0x[\da-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.\d+|(0|[1-9]\d*)(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_MOST_NODES = 100_000  # of a file, each alias counted as what it stands for


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, lists and mappings, and no repeated keys."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile(r"^<<$"))]}
    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "str", "seq", "map")
    }

    def construct_yaml_bool(self, node: yaml.ScalarNode) -> bool:
        text = str(self.construct_scalar(node)).lower()
        if text not in ("true", "false"):  # behind a tag !!bool
            raise yaml.constructor.ConstructorError(
                None, None, f"{text[:40]!r} is neither true nor false", node.start_mark
            )
        return text == "true"

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        try:
            return int(text, 0 if text.startswith(("0o", "0x")) else 10)
        except ValueError as error:  # of a tag !!int before other text, or of more digits than Python reads
            raise yaml.constructor.ConstructorError(
                None, None, f"{text[:40]!r} is no whole number, or is too long", node.start_mark
            ) from error

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        text = str(self.construct_scalar(node))
        try:
            return float(text.replace(".inf", "inf").replace(".nan", "nan") if "n" in text.lower() else text)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"{text[:40]!r} is no number", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "a mapping was expected", node.start_mark)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_document(self, node: yaml.Node) -> Any:
        _check_size(node)
        return super().construct_document(node)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader`, or a reader of YAML 1.1, would take for something else than text."""

    yaml_implicit_resolvers = {first: list(found) for first, found in yaml.SafeDumper.yaml_implicit_resolvers.items()}


for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.construct_yaml_bool)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def dump(values: Any) -> str:
    """``values`` as YAML that `read_file` and readers of YAML 1.1 read alike."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False))


def _check_size(node: yaml.Node) -> None:
    """Raises yaml.YAMLError where aliases lead back to what holds them, or multiply without bound."""
    sizes: dict[int, int | None] = {}  # None: being counted

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if (known := sizes[id(node)]) is None:
                raise yaml.constructor.ConstructorError(None, None, "an alias leads back to itself", node.start_mark)
            return known
        sizes[id(node)] = None
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = (child for part in parts for child in (part if isinstance(part, tuple) else (part,)))
        total = 1 + sum(map(size, inner))
        if total > _MOST_NODES:
            raise yaml.constructor.ConstructorError(None, None, "it is too large for a configuration", node.start_mark)
        sizes[id(node)] = total
        return total

    size(node)


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
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except yaml.YAMLError:
        if stripped.startswith(_OPENING):
            raise
        return text
    whole = node is not None and text[node.start_mark.index : node.end_mark.index] == stripped
    if stripped.startswith(_OPENING):
        if not whole:
            raise yaml.YAMLError("something follows the closing quote or bracket")
        return _loaded(text)
    is_word = isinstance(node, yaml.ScalarNode) and whole and not stripped.startswith(("&", "!", "|", ">", "<<"))
    value = _loaded(text) if is_word else text
    return text if isinstance(value, str) else value


def _loaded(text: str) -> Any:
    """Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


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
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{file}: 'base' is {base!r}: it names a file, or is a list of names")
    merged: dict[str, Any] = {}
    for name in names:
        merged = merge(merged, read_file(file.parent / name, lines, (*ancestors, file)))
    _record_lines(node, (), file, lines)  # last, as the values of this file win
    return merge(merged, values)


def _parse(file: Path) -> tuple[dict[str, Any], yaml.Node]:
    """The values of one file, and the nodes that know their lines."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read configuration {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text") from error
    except ValueError as error:  # the name holds what no name of a file can
        raise UserError(f"cannot read configuration {file}: {error}") from error
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise UserError(f"{file}: it is nested too deeply for a configuration") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{file}:{line}: not valid YAML: character {error.character:#x} may not stand there") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise UserError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    finally:
        if loader is not None:
            loader.dispose()
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
