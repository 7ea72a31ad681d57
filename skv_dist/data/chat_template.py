"""Chats as tokens, through the template that a Hugging Face tokenizer brings along."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from skv_dist.errors import UserError

Messages = Sequence[Mapping[str, Any]]
_MARKED = "{% generation %}", "{%- generation %}", "{% generation -%}", "{%- generation -%}"


def encode_chat(stock: Any, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
    """A chat as its template renders it.

    Args:
        stock: a tokenizer of transformers.

    Returns:
        The ids, int64 [n], and bool [n]: which of them are what an assistant answers, with the token that ends the
        turn. What the template writes before an answer ("<|im_start|>assistant") is no part of it.

    Raises:
        UserError: there is no template, it cannot render these messages, or it renders the beginning of the chat
            otherwise once more follows, so that an answer cannot be told from its prompt.
    """
    with _rendering(stock):
        if any(mark in stock.get_chat_template() for mark in _MARKED):
            marked = stock.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return np.asarray(marked["input_ids"], dtype=np.int64), np.asarray(marked["assistant_masks"], dtype=bool)

        def render(some: Messages, goes_on: bool) -> str:
            return str(stock.apply_chat_template(list(some), tokenize=False, add_generation_prompt=goes_on))

        whole = render(messages, False)
        spans = _answers(render, messages, whole)
    encoded = stock(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    return ids, _tokens_within(encoded["offset_mapping"], spans, len(whole))


def encode_prompt(stock: Any, messages: Messages) -> list[int]:
    """The ids of a chat up to where an assistant begins to answer.

    Raises:
        UserError: as `encode_chat`.
    """
    with _rendering(stock):
        rendered = stock.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return [int(i) for i in stock(rendered, add_special_tokens=False, verbose=False)["input_ids"]]


@contextmanager
def _rendering(stock: Any) -> Iterator[None]:
    if not stock.chat_template:
        raise UserError(f"data.tokenizer '{stock.name_or_path}' has no chat template, which messages need")
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # jinja and transformers raise a different class for each way this can fail
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the chat template of the tokenizer cannot render these messages: {reason}") from error


def _answers(render: Callable[[Messages, bool], str], messages: Messages, whole: str) -> list[tuple[int, int]]:
    """Where the answers begin and end in the rendered chat."""
    spans = []
    for turn, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        prompt, answered = render(messages[:turn], True), render(messages[: turn + 1], False)
        if not (whole.startswith(answered) and answered.startswith(prompt)):
            raise UserError(
                f"the chat template of the tokenizer renders message {turn + 1} otherwise once more follows, so that "
                "the answer cannot be told from its prompt: end the chats there, or use a tokenizer whose template "
                "marks answers with {% generation %}"
            )
        spans.append((len(prompt), len(answered)))
    return spans


def _tokens_within(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], length: int) -> np.ndarray:
    """bool [n]: which tokens begin within one of the spans. One that begins before belongs to what is before."""
    inside = np.zeros(length + 1, dtype=bool)
    for begin, end in spans:
        inside[begin:end] = True
    return np.array([begin < end and inside[begin] for begin, end in offsets], dtype=bool)
