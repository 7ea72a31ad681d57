"""What an exported model is compared with beside the checkpoint: the text, and a model in which no layer shares."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from skv_dist.config.blocks import OPTIONS
from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError, cause_in_one_line

from .hf_config import hf_config, shared_fields
from .names import entries
from .to_hf import copy_code, write_tensors

Tokens = npt.NDArray[np.int64]

TEXT = (
    "A language model keeps the keys and values of every token it has read, in every layer. When some layers read "
    "those of an earlier one, the memory that a long conversation takes shrinks by as much, and the answer should "
    "stay the same: 1 + 1 = 2, def f(x): return x, and so on, in any language (c'est la vie; Grüße)."
)


def comparison_text(file: Path | None, num_tokens: int) -> str:
    """The beginning of ``file``, enough for ``num_tokens``, or a few sentences.

    Raises:
        UserError: ``file`` cannot be read, or two tokens are not asked for.
    """
    if num_tokens < 2:
        raise UserError("--tokens must be at least 2")
    if file is None:
        return TEXT
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(64 * num_tokens)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def comparison_tokens(exported: Path, text: str, max_tokens: int) -> Tokens:
    """[1, s]: the beginning of ``text`` by the folder's own tokenizer.

    Raises:
        UserError: the text is too short, or the tokenizer cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    from ..engines.models.modeling_skv import SkvConfig

    AutoConfig.register(SkvConfig.model_type, SkvConfig, exist_ok=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens]
    except Exception as error:  # of whatever class: a file may be damaged in any way
        raise UserError(f"the tokenizer of {exported} cannot be used: {cause_in_one_line(error)}") from error
    if len(ids) < 2:
        raise UserError("the text to compare on has fewer than two tokens")
    return np.asarray([ids], dtype=np.int64)


def write_unshared(model: ModelConfig, out: Path, dtype: str) -> None:
    """A model whose cache has the same shape and in which no layer shares; all else is as small as can be."""
    changes = {"hidden_size": 8, "ffn_hidden_size": 8, "vocab_size": 8, "tie_embeddings": True, "block": "llama"}
    changes |= {key: ModelConfig.model_fields[key].default for key in OPTIONS}
    small = model.model_copy(update={**changes, "head_dim": model.kv_channels})
    layers = range(model.num_layers)
    special: dict[str, int | None] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    out.mkdir()
    config = {**hf_config(small, dtype, special), **shared_fields(small, tuple(layers), layers)}
    (out / "config.json").write_text(json.dumps(config))
    copy_code(out)
    write_tensors(
        out,
        list(entries(small)),
        layers,
        dtype,
        2**30,
        lambda entry: [torch.ones(shape) for shape in entry.theirs.values()],
    )
