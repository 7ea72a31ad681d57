"""What ``from-hf`` is given: a folder of transformers, the name of a model on the hub, or GGUF."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from skv_dist.errors import UserError, cause_in_one_line

from .progress import say

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# The card for its licence. Not the same weights once more, in other formats or as Mistral and Meta name them.
_WANTED = ["README.md", "*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_UNWANTED = ["*/*", "consolidated*"]
_GGUF = ".gguf"


class Brought(NamedTuple):
    """Attributes:
    folder: of transformers.
    hub_name: of the model, where it was taken from there.
    """

    folder: Path
    hub_name: str | None = None


@contextlib.contextmanager
def brought(given: str, scratch: Path) -> Iterator[Brought]:
    """A folder of transformers, which is gone afterwards where it had to be made.

    Args:
        given: a folder; ``owner/name`` of a model on the hub, where there is no such folder; a file of GGUF, or a
            folder that holds one and no ``config.json``.
        scratch: where such a folder is made. It takes four bytes for each parameter.

    Raises:
        UserError: the model cannot be had.
    """
    place = Path(given).expanduser()
    gguf = place if place.suffix == _GGUF and place.is_file() else _only_gguf(place)
    if gguf is not None:
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".gguf.") as made:
            folder = Path(made) / gguf.stem
            _widen(gguf, folder)
            yield Brought(folder)
    elif _NAME.fullmatch(given) and not place.exists() and not place.parent.exists():
        yield Brought(_downloaded(given), given)
    else:
        yield Brought(place)


def _only_gguf(folder: Path) -> Path | None:
    """Raises UserError where there are several, and nothing says which is meant."""
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    found = sorted(folder.glob(f"*{_GGUF}"))
    if len(found) > 1:
        raise UserError(f"{folder} holds {len(found)} files of GGUF: name one, such as {found[0]}")
    return found[0] if found else None


def _downloaded(name: str) -> Path:
    """The folder of a model in the hub's cache."""
    from huggingface_hub import snapshot_download

    say(f"{name}: there is no such folder; taken from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:
        raise UserError(f"{name} is no folder, and cannot be had from the hub: {cause_in_one_line(error)}") from error


def _widen(file: Path, out: Path) -> None:
    """Write a GGUF model as transformers reads it, its numbers in float32."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(f"{file} needs the package gguf: pip install 'skv-dist[gguf]'") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    say(f"{file}: its numbers are widened to float32")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": os.fspath(file.parent.absolute()), "gguf_file": file.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # of the file; nothing is quantized any more
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    except Exception as error:
        raise UserError(f"{file} cannot be read by transformers: {cause_in_one_line(error)}") from error
