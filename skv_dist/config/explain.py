"""One key, or the keys of a section, explained in a terminal (``skv-train --explain``)."""

from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from skv_dist.config.keys import field_at, section_of, unknown_key
from skv_dist.config.run import RunConfig
from skv_dist.config.words import BASE_MEANING, default_in_words, first_sentence, meaning, type_in_words, wrapped
from skv_dist.errors import UserError

_WIDTH = 100


def explain(key: str) -> str:
    """What ``key`` (``section``, ``section.key``, ...) means; of a section also its keys. Empty: the sections.

    Raises:
        UserError: there is no such key; names the nearest one.
    """
    if not key:
        return "\n".join([*_keys(RunConfig), "", *wrapped(BASE_MEANING, _WIDTH)])
    if key == "base":
        return "\n".join([key, *_indented(BASE_MEANING)])
    field = _known_field(key)
    lines = [key, f"  type:    {type_in_words(field)}", f"  default: {default_in_words(field)}", ""]
    lines += _indented(meaning(field))
    section = section_of(field)
    if section is not None:
        lines += ["", f"  Its keys, each explained by --explain {key}.KEY:", *_keys(section)]
    return "\n".join(lines)


def _known_field(key: str) -> FieldInfo:
    path = [part for part in key.split(".") if not part.isdigit()] or [key]  # data.sources.0.path is data.sources.path
    field = None
    for length in range(1, len(path) + 1):
        field = field_at(path[:length])
        if field is None:
            raise UserError(unknown_key(path[:length]))
    assert field is not None
    return field


def _indented(text: str) -> Iterator[str]:
    return (f"  {line}" for line in wrapped(text, _WIDTH - 2))


def _keys(section: type[BaseModel]) -> Iterator[str]:
    """The keys of a section, each with the first sentence of its meaning."""
    column = max(map(len, section.model_fields)) + 4
    for name, field in section.model_fields.items():
        first, *others = wrapped(first_sentence(meaning(field)), _WIDTH - column)
        yield f"  {name:<{column - 2}}{first}"
        yield from (f"{'':<{column}}{line}" for line in others)
