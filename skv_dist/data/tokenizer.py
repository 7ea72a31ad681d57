"""Tokenizers: bytes by default (nothing to download), or any Hugging Face tokenizer."""

import hashlib
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from skv_dist.data.chat_template import Messages, encode_chat, encode_prompt
from skv_dist.errors import UserError


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer.

    Attributes:
        vocab_size: its largest id + 1.
        begin_of_document: the token that it puts before each text by itself; None: it puts none there.
        end_of_document: its end-of-sequence token.
        name: as in ``data.tokenizer``.
    """

    vocab_size: int
    begin_of_document: int | None
    end_of_document: int
    name: str

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 [n], without special tokens."""

    def encode_chat(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """See `skv_dist.data.chat_template.encode_chat`."""

    def encode_prompt(self, messages: Messages) -> list[int]:
        """See `skv_dist.data.chat_template.encode_prompt`."""

    def decode(self, ids: list[int]) -> str:
        """Text, without special tokens."""

    def spell(self, ids: list[int]) -> str:
        """Text in which special tokens stand by their names."""

    def fingerprint(self) -> str:
        """Changes whenever the same text could give other ids."""

    def fingerprints(self) -> list[str]:
        """That of today, and those that earlier versions gave the same tokenizer."""

    def files(self) -> Mapping[str, bytes]:
        """What to write into a folder so that `load_tokenizer` gives this tokenizer again; nothing for bytes."""


class ByteTokenizer:
    """UTF-8 bytes with the ids of transformers' ByT5 tokenizer: byte b is b + 3; 0 pad, 1 end of document, 2 unknown.

    Being ByT5's, it can be saved beside an exported model as a stock tokenizer.
    """

    name = "byte"
    vocab_size = 259
    begin_of_document: int | None = None
    end_of_document = 1
    _offset = 3
    _names = (b"<pad>", b"</s>", b"<unk>")

    def encode(self, text: str) -> np.ndarray:
        # surrogatepass: a lone surrogate in scraped text must not end a run
        data = text.encode("utf-8", errors="surrogatepass")
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64) + self._offset

    def encode_chat(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        raise UserError("data.tokenizer 'byte' has no chat template: name a tokenizer that has one")

    def encode_prompt(self, messages: Messages) -> list[int]:
        return self.encode_chat(messages)[0].tolist()

    def decode(self, ids: list[int]) -> str:
        data = bytes(i - self._offset for i in ids if self._offset <= i < self.vocab_size)
        return data.decode("utf-8", errors="replace")

    def spell(self, ids: list[int]) -> str:
        pieces = (bytes([i - self._offset]) if i >= self._offset else self._names[i] for i in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        return "byte-v1"

    def fingerprints(self) -> list[str]:
        return [self.fingerprint()]

    def files(self) -> Mapping[str, bytes]:
        return {}


class HuggingFaceTokenizer:
    """A tokenizer saved in a folder or named on the hub, through ``transformers.AutoTokenizer`` (``stock``)."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self.stock = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # transformers raises a different class for each way this can fail
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"data.tokenizer '{name}' cannot be loaded: {reason}") from error
        if self.stock.eos_token_id is None:
            raise UserError(f"data.tokenizer '{name}' has no end-of-sequence token, which ends each document")
        _check_template_names(name, self.stock.chat_template)
        self.name = name
        self.vocab_size = max(len(self.stock), 1 + max(self.stock.get_vocab().values(), default=-1))  # ids have holes
        self.end_of_document = int(self.stock.eos_token_id)
        self._earlier_fingerprints = self._without_settings()
        self.begin_of_document = self._added_at_begin()

    def encode(self, text: str) -> np.ndarray:
        if not text.isascii():
            text = _without_lone_surrogates(text)
        ids = self.stock(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    def encode_chat(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        return encode_chat(self.stock, messages)

    def encode_prompt(self, messages: Messages) -> list[int]:
        return encode_prompt(self.stock, messages)

    def decode(self, ids: list[int]) -> str:
        return str(self.stock.decode(ids, skip_special_tokens=True))

    def spell(self, ids: list[int]) -> str:
        return str(self.stock.decode(ids, skip_special_tokens=False))

    def fingerprint(self) -> str:
        return _digest(f"{self._content()}\n{self.end_of_document}")

    def fingerprints(self) -> list[str]:
        return [self.fingerprint(), *self._earlier_fingerprints]

    def _added_at_begin(self) -> int | None:
        """The token that the tokenizer itself puts before a text, as those of Llama and Mistral do."""
        begin = self.stock.bos_token_id
        added = self.stock("a", verbose=False)["input_ids"]
        return int(begin) if begin is not None and added and added[0] == begin else None

    def files(self) -> Mapping[str, bytes]:
        """Empty, with a warning, where transformers loads something else from what it saved itself."""
        with tempfile.TemporaryDirectory() as scratch:
            self.stock.save_pretrained(scratch)
            try:
                again = HuggingFaceTokenizer(scratch)
                same = again._what_it_does() == self._what_it_does()
            except UserError:
                same = False
            if not same:
                warnings.warn(
                    f"data.tokenizer '{self.name}' is not the same once it is saved and loaded: checkpoints name it "
                    "and hold no copy",
                    stacklevel=2,
                )
                return {}
            saved = (path for path in Path(scratch).rglob("*") if path.is_file())
            return {path.relative_to(scratch).as_posix(): path.read_bytes() for path in saved}

    def _what_it_does(self) -> tuple[object, ...]:
        return self.fingerprint(), self.begin_of_document, self.vocab_size, self.stock.chat_template

    def _content(self) -> str:
        backend = getattr(self.stock, "backend_tokenizer", None)
        return backend.to_str() if backend is not None else repr(sorted(self.stock.get_vocab().items()))

    def _without_settings(self) -> list[str]:
        """Clear truncation and padding, which are no part of the tokenizer; return the fingerprints of before.

        Earlier versions took them in, with the settings before the first text and without them behind it.
        """
        earlier = [_digest(self._content())]
        backend = getattr(self.stock, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        return list(dict.fromkeys([*earlier, _digest(self._content())]))


def _check_template_names(tokenizer: str, templates: object) -> None:
    """Each of several chat templates is saved under its name. Raises UserError where that leads out of the folder."""
    for name in templates if isinstance(templates, dict) else ():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise UserError(f"data.tokenizer '{tokenizer}' has a chat template called {name!r}, which is no file name")


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _without_lone_surrogates(text: str) -> str:
    """Halves of characters, which scraped JSON holds, become U+FFFD: no UTF-8 can say them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
    return text


_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called ``name`` in ``data.tokenizer``.

    Raises:
        UserError: it cannot be loaded.
    """
    if name == "byte":
        return ByteTokenizer()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).exists() for file in _FILES):  # transformers would make an empty tokenizer up
            raise UserError(f"data.tokenizer '{name}' holds no tokenizer: none of {', '.join(_FILES)} is there")
        return HuggingFaceTokenizer(str(folder))
    if not _may_be_on_hub(name):
        raise UserError(f"data.tokenizer '{name}' is not a folder")
    return HuggingFaceTokenizer(name)


def _may_be_on_hub(name: str) -> bool:
    """Names there are ``NAME`` or ``OWNER/NAME``. Where a folder of that first name is here, the second was meant to
    be in it: it must not be asked for elsewhere."""
    first, *others = name.split("/")
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or len(others) > 1
    return not is_path and not (others and Path(first).is_dir())
