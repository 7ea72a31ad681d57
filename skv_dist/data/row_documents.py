"""From a row of a file to a document: its text, a prompt with its response, or a chat."""

import string
from collections.abc import Mapping
from typing import Any, Protocol

from skv_dist.config.data import SourceConfig
from skv_dist.data.examples import Chat, Document, Example
from skv_dist.errors import UserError

Row = Mapping[str, Any]


class NoDocumentError(Exception):
    """The row holds none, and why.

    Attributes:
        reason: as `skv_dist.data.skipped.Skipped` counts it.
        is_missing: whether a field is not there at all, in contrast to an empty one.
    """

    def __init__(self, reason: str, *, is_missing: bool) -> None:
        super().__init__(reason)
        self.reason, self.is_missing = reason, is_missing


class DocumentOfRow(Protocol):
    """Makes documents of rows.

    Attributes:
        fields: names of those that it reads.
        keys: of a source that say so, for messages.
    """

    fields: tuple[str, ...]
    keys: str

    def __call__(self, row: Row, place: str) -> Document:
        """The document of the row at ``place`` (file and row).

        Raises:
            NoDocumentError: there is none.
            UserError: a field holds what it must not; the message names the field, not the row.
        """


def document_of_row(source: SourceConfig) -> DocumentOfRow:
    """What the configuration of a source asks for.

    Raises:
        UserError: a template names no field.
    """
    if source.messages_field is not None:
        return _ChatOfRow(source.messages_field)
    if source.prompt_field is not None and source.response_field is not None:
        return _ExampleOfRow(source.prompt_field, source.response_field)
    return _TextOfRow(source.text_field)


class TextTemplate:
    """A text out of fields of a row.

    Args:
        source: a field's name, or a text with the names of fields in braces, such as ``Question: {question}``.
        key: where ``source`` stands, for messages.

    Attributes:
        fields: the names of the fields that it reads.

    Raises:
        UserError: a brace is left open, or holds no name of a field.
    """

    def __init__(self, source: str, key: str) -> None:
        self._parts: list[tuple[str, str | None]] = [("", source)]  # what is before a field, and its name
        if "{" in source or "}" in source:
            self._parts = [*_parsed(source, key)]
        self.fields = tuple(dict.fromkeys(name for _, name in self._parts if name is not None))
        if not self.fields:
            raise UserError(f"{key} '{source}' names no field")

    def text(self, row: Row) -> str:
        """Of a list of texts the first is taken.

        Raises:
            NoDocumentError: a field is missing, null or empty.
            UserError: a field holds no text.
        """
        return "".join(before + ("" if name is None else _text(row, name)) for before, name in self._parts)


def _parsed(source: str, key: str) -> list[tuple[str, str | None]]:
    try:
        parts = list(string.Formatter().parse(source))
    except ValueError as error:
        raise UserError(f"{key} '{source}' cannot be read: {error}") from error
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion or any(mark in name for mark in ".[]")):
            raise UserError(f"{key} '{source}': {{{name}}} holds no name of a field; write {{{{ for a brace")
    return [(before, name) for before, name, _, _ in parts]


def _value(row: Row, field: str) -> Any:
    if field not in row:
        raise NoDocumentError(f"without a field '{field}'", is_missing=True)
    value = row[field]
    if value is None or value in ("", []):
        raise NoDocumentError("null" if value is None else "empty", is_missing=False)
    return value


def _text(row: Row, field: str) -> str:
    value = _value(row, field)
    if isinstance(value, list):
        value = value[0]
    if not isinstance(value, str):
        raise UserError(f"field '{field}' is {type(value).__name__}, not text: set another field, or mend the file")
    return value


class _TextOfRow:
    keys = "text_field"

    def __init__(self, field: str) -> None:
        self.fields: tuple[str, ...] = (field,)

    def __call__(self, row: Row, place: str) -> str:
        value = _value(row, self.fields[0])
        if not isinstance(value, str):
            raise UserError(
                f"field '{self.fields[0]}' is {type(value).__name__}, not text: set text_field, or mend the file"
            )
        return value


class _ExampleOfRow:
    keys = "prompt_field and response_field"

    def __init__(self, prompt: str, response: str) -> None:
        self._prompt = TextTemplate(prompt, "prompt_field")
        self._response = TextTemplate(response, "response_field")
        self.fields = tuple(dict.fromkeys([*self._prompt.fields, *self._response.fields]))

    def __call__(self, row: Row, place: str) -> Example:
        return Example(self._prompt.text(row), self._response.text(row))


class _ChatOfRow:
    keys = "messages_field"

    def __init__(self, field: str) -> None:
        self.fields: tuple[str, ...] = (field,)

    def __call__(self, row: Row, place: str) -> Chat:
        field = self.fields[0]
        messages = _value(row, field)
        if not (isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages)):
            raise UserError(f"field '{field}' is no list of messages with role and content")
        if not any(message["role"] == "assistant" for message in messages):
            raise NoDocumentError("chats without an answer", is_missing=False)
        return Chat(messages, place)
