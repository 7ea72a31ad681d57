"""A checkpoint of any layout to a folder that inference engines load."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.save import read_tensors, tensor_shapes
from skv_dist.config.load import load_config
from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError

from ..engines import models
from ..weights import write_weights
from .hf_config import check_exportable, gemma4_fields, hf_config, shared_fields, stock_architecture, stock_fields
from .names import Entry, entries, is_left_out, shapes, split
from .tokenizer import save_tokenizer

MODELS = Path(models.__file__).parent
CODE = ("modeling_skv.py", "mlx_skv.py")  # what travels with a shared model


@dataclass(frozen=True)
class Export:
    """What is asked for.

    Attributes:
        sources: ``kv_source_layers``; what an adaptive folder does unless told otherwise at load.
        adaptive: keep the K/V weights of all layers.
        architecture: whose layers a model that shares nothing is said to have; None chooses.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None: what the run computed in.
        shard_bytes: a file of weights is no larger, unless one tensor is.
    """

    sources: tuple[int, ...]
    adaptive: bool = False
    architecture: str | None = None
    dtype: str | None = None
    shard_bytes: int = 2 * 2**30

    @property
    def is_stock(self) -> bool:
        """Whether stock Llama, Qwen3 or Mistral code runs it."""
        return not self.adaptive and all(source == layer for layer, source in enumerate(self.sources))


def write_folder(checkpoint: Path, aside: Path, export: Export) -> None:
    """Write the whole export but its model card into the folder ``aside``. One tensor is in memory at a time.

    Raises:
        UserError: the checkpoint is damaged, or cannot be expressed.
    """
    files.verify(checkpoint)
    run = load_config(checkpoint / files.CONFIG)
    state = files.read_state(checkpoint)
    model, vocab_size = run.model, int(state["vocab_size"])
    check_exportable(model)
    dtype = export.dtype or {"bf16": "bfloat16", "fp32": "float32"}[run.train.precision]
    special = save_tokenizer(run.data.tokenizer, aside)
    fields = hf_config(model, vocab_size, dtype, special)
    owners = None if export.is_stock or export.adaptive else sorted(set(export.sources))
    if model.block == "gemma4":
        if export.adaptive or export.architecture is not None:
            raise UserError(
                "model.block is 'gemma4', which is exported as stock Gemma 4: leave --adaptive and --architecture out"
            )
        del fields["hidden_act"]
        fields.update(gemma4_fields(model, vocab_size, export.sources))
    elif export.is_stock:
        fields.update(stock_fields(stock_architecture(model, export.architecture)))
    else:
        kept = owners if owners is not None else list(range(model.num_layers))
        fields.update(shared_fields(model, export.sources, kept))
        for name in CODE:
            shutil.copy(MODELS / name, aside / name)
    (aside / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    generation = {key: value for key, value in special.items() if value is not None}
    (aside / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    present = tensor_shapes(checkpoint)
    for entry in entries(model):
        if entry.ours and f"model.{entry.ours}" not in present:
            raise UserError(f"checkpoint {checkpoint} has no tensor model.{entry.ours}")

    def read(entry: Entry) -> Sequence[torch.Tensor]:
        if not entry.ours:
            return [torch.full(s, float(entry.kind == "ones")) for s in shapes(entry, model, vocab_size)]
        return _read(checkpoint, entry, model)

    write_tensors(aside, model, vocab_size, owners, export, dtype, read)


def _read(checkpoint: Path, entry: Entry, model: ModelConfig) -> Sequence[torch.Tensor]:
    name = f"model.{entry.ours}"
    return split(entry, read_tensors(checkpoint, [name])[name], model)


def write_tensors(
    out: Path, model: ModelConfig, vocab_size: int, owners: Sequence[int] | None, export: Export, dtype: str, read: Any
) -> None:
    """Safetensors of all tensors, those of `is_left_out` excepted.

    Args:
        read: from an `Entry` to its tensors in the order of ``entry.theirs``.
    """
    kept = dict(pair for entry in entries(model) for pair in _kept(entry, model, vocab_size, owners))
    wanted = (entry for entry in entries(model) if kept.keys() & entry.theirs)
    found = (pair for entry in wanted for pair in zip(entry.theirs, read(entry)))
    write_weights(out, kept, dtype, export.shard_bytes, ((name, tensor) for name, tensor in found if name in kept))


def _kept(
    entry: Entry, model: ModelConfig, vocab_size: int, owners: Sequence[int] | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what an entry contributes."""
    for name, shape in zip(entry.theirs, shapes(entry, model, vocab_size)):
        if not is_left_out(name, owners):
            yield name, shape
