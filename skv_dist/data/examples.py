"""Documents as tokens, with a mark on those that a model is to answer.

A document is a text, a prompt with its response, or a chat. Prompt and response are tokenized apart, as an inference
engine does that sees the prompt alone; a chat is what the tokenizer's own template makes of it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError


class Example(NamedTuple):
    """A prompt and what a model is to answer."""

    prompt: str
    response: str


class Chat(NamedTuple):
    """Messages in the form that chat templates read, such as {"role": "user", "content": "Hello"}.

    Attributes:
        place: file and row, for messages.
    """

    messages: Sequence[Mapping[str, Any]]
    place: str


Document = str | Example | Chat


class TokenDocument(NamedTuple):
    """A document on its way to disk.

    Attributes:
        ids: int [n], with the tokens that begin and end it. Empty: there was no text.
        text_hash: of its text (`text_hash`).
        answer: bool [n], the tokens that a model is to answer; None for a text.
    """

    ids: np.ndarray
    text_hash: int
    answer: np.ndarray | None = None


def text_hash(text: str) -> int:
    """64 bits that stand for a document."""
    data = text.encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def document_hash(document: Document) -> int:
    """`text_hash` of what tells a document from others."""
    if isinstance(document, str):
        return text_hash(document)
    if isinstance(document, Example):
        return text_hash(f"{document.prompt}\0{document.response}")
    return text_hash(json.dumps(document.messages, sort_keys=True))


def num_characters(document: Document) -> int:
    """About how much text it is."""
    if isinstance(document, str):
        return len(document)
    if isinstance(document, Example):
        return len(document.prompt) + len(document.response)
    return sum(len(str(message.get("content"))) for message in document.messages)


def encode_document(tokenizer: Tokenizer, document: Document) -> TokenDocument:
    """A document as tokens.

    Texts and responses end with the tokenizer's end token, and begin as the tokenizer wants it. A chat begins and
    ends as its template says.

    Raises:
        UserError: a chat cannot be rendered (`skv_dist.data.chat_template.encode_chat`).
    """
    if isinstance(document, str):
        text = tokenizer.encode(document)
        ids = text if len(text) == 0 else _whole(tokenizer, text)
        return TokenDocument(ids, document_hash(document))
    if isinstance(document, Example):
        prompt, response = tokenizer.encode(document.prompt), tokenizer.encode(document.response)
        ids = _whole(tokenizer, prompt, response)
        answer = np.zeros(len(ids), dtype=bool)
        answer[len(ids) - len(response) - 1 :] = True  # and the end token, so that a model learns to stop
        return TokenDocument(ids, document_hash(document), answer)
    try:
        ids, answer = tokenizer.encode_chat(document.messages)
    except UserError as error:
        raise UserError(f"data source '{document.place}: {error}") from error
    return TokenDocument(ids, document_hash(document), answer)


def _whole(tokenizer: Tokenizer, *pieces: np.ndarray) -> np.ndarray:
    begin = [] if tokenizer.begin_of_document is None else [tokenizer.begin_of_document]
    return np.concatenate([np.array(begin, dtype=np.int64), *pieces, [tokenizer.end_of_document]]).astype(np.int64)
