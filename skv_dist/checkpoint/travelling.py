"""What a checkpoint takes with it beside the weights, so that it needs nothing from where it was made.

``tokenizer/`` is the tokenizer of the run, as ``AutoTokenizer.from_pretrained`` reads it; of bytes there is none.
``origin.json`` tells of the model that ``skv-convert from-hf`` read: its name and licence, if they are known, and
its ``generation_config.json``, without which a chat model would not know where to stop.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skv_dist.checkpoint import folder as files
from skv_dist.data.tokenizer import Tokenizer, load_tokenizer
from skv_dist.errors import UserError
from skv_dist.files import parse_json, write_synced

TOKENIZER = "tokenizer"
ORIGIN = "origin.json"

Files = Mapping[str, bytes]  # by path within the checkpoint


def travelling_files(tokenizer: Tokenizer, start: Path | None = None) -> Files:
    """What the checkpoints of a run take along.

    Args:
        start: the checkpoint that the run begins with or goes on from.

    Raises:
        UserError: ``start`` has an ``origin.json`` that cannot be read.
    """
    saved = {f"{TOKENIZER}/{name}": content for name, content in tokenizer.files().items()}
    origin = {} if start is None else origin_of(start)
    return {**saved, **({ORIGIN: (json.dumps(origin, indent=1) + "\n").encode()} if origin else {})}


def write_travelling(folder: Path, travelling: Files) -> None:
    """Raises OSError."""
    for name, content in travelling.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_synced(folder / name, content)


def tokenizer_of(folder: Path, name: str) -> Tokenizer:
    """The tokenizer of a checkpoint: its own copy, or, in those without one, what ``data.tokenizer`` names.

    Args:
        name: ``data.tokenizer``; another one than the checkpoint's is loaded as it is named.

    Raises:
        UserError: it cannot be loaded.
    """
    own = folder / TOKENIZER
    if own.is_dir() and name == files.read_config(folder).data.tokenizer:
        return load_tokenizer(str(own.absolute()))
    return load_tokenizer(name)


def origin_of(folder: Path) -> dict[str, Any]:
    """``origin.json`` of a checkpoint; empty where there is none.

    Raises:
        UserError: it cannot be read, or is not what was written.
    """
    try:
        origin = parse_json((folder / ORIGIN).read_text(encoding="utf-8"))
        if not isinstance(origin, dict) or not isinstance(origin.get("generation_config", {}), dict):
            raise ValueError("it is no object")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{folder / ORIGIN} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise files.DamagedError(f"checkpoint {folder} is damaged: {ORIGIN} is not what was written") from error
    return origin


def end_tokens(origin: Mapping[str, Any], tokenizer: Tokenizer) -> set[int]:
    """Ids that end a text: the tokenizer's, and those that the original model's ``generation_config`` names."""
    ends = generation_settings(origin, tokenizer).get("eos_token_id")
    return {tokenizer.end_of_document, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}


def generation_settings(origin: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The original model's ``generation_config``; without what names tokens, if the tokenizer is another one."""
    settings = dict(origin.get("generation_config", {}))
    if origin.get("tokenizer") in tokenizer.fingerprints():
        return settings
    return {key: value for key, value in settings.items() if not key.endswith(("token_id", "_ids", "_tokens", "_bias"))}
