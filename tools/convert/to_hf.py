"""A checkpoint of any layout to a folder that inference engines load."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.frozen_model import config_of
from skv_dist.checkpoint.load import tensor_shapes
from skv_dist.checkpoint.merged import read_weight
from skv_dist.checkpoint.travelling import generation_settings, origin_of, tokenizer_of
from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError
from skv_dist.routing.kinds import check_kinds

from ..engines import models
from ..weights import write_weights
from .blocks import BLOCKS, Map
from .families import FAMILIES
from .hf_config import (
    CODE,
    OUR_MODEL_TYPE,
    check_exportable,
    hf_config,
    shared_fields,
)
from .names import Entry, entries, is_left_out, split
from .progress import Progress
from .stock import stock_architecture, stock_fields
from .tokenizer import save_tokenizer

MODELS = Path(models.__file__).parent  # holds `CODE`


@dataclass(frozen=True)
class Export:
    """What is asked for.

    Attributes:
        sources: ``kv_source_layers``; what an adaptive folder does unless told otherwise at load.
        adaptive: keep the K/V weights of all layers.
        architecture: whose layers a model that shares nothing is said to have; None chooses.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None: what the run computed in.
        shard_bytes: a file of weights is no larger, unless one tensor is.
        chosen: how the map was chosen, in words; empty where nothing is shared.
        order: in which the layers of an adaptive folder keep their cache, the most needed first; None: uniform groups.
    """

    sources: Map
    adaptive: bool = False
    architecture: str | None = None
    dtype: str | None = None
    shard_bytes: int = 2 * 2**30
    chosen: str = ""
    order: tuple[int, ...] | None = None

    @property
    def is_stock(self) -> bool:
        """Whether no layer shares, so that stock code runs it."""
        return not self.adaptive and all(source == layer for layer, source in enumerate(self.sources))

    @property
    def weight_layers(self) -> Sequence[int]:
        """The layers whose key and value weights are kept."""
        return range(len(self.sources)) if self.adaptive else sorted(set(self.sources))


def check_expressible(checkpoint: Path, export: Export) -> None:
    """Raises UserError where the export cannot be written, whatever the weights are."""
    model = config_of(checkpoint).model
    check_exportable(model)
    _architecture_fields(model, export)
    _check_complete(checkpoint, model)


def write_folder(checkpoint: Path, out: Path, export: Export, name: str | None = None) -> None:
    """Write the whole export but its model card into the folder ``out``. One tensor is in memory at a time.

    Args:
        name: what ``out`` will be called, in lines of progress.

    Raises:
        UserError: the checkpoint is damaged, or cannot be expressed.
    """
    files.verify(checkpoint)
    run = config_of(checkpoint)
    model = run.model
    check_exportable(model)
    dtype = export.dtype or {"bf16": "bfloat16", "fp32": "float32"}[run.train.precision]
    architecture = _architecture_fields(model, export)
    _check_complete(checkpoint, model)
    tokenizer = tokenizer_of(checkpoint, run.data.tokenizer)
    tokens = {key: value for key, value in save_tokenizer(tokenizer, out).items() if value is not None}
    generation = {**tokens, **generation_settings(origin_of(checkpoint), tokenizer)}
    special = {key: generation.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = {**hf_config(model, dtype, special), **architecture}
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", generation)
    if config["model_type"] == OUR_MODEL_TYPE:
        copy_code(out)
    family = FAMILIES.get(config["model_type"])
    listed = list(entries(model, family.joined if family else None))
    progress = Progress(f"{name or out}", 4 * sum(math.prod(shape) for e in listed for shape in e.theirs.values()))

    def read(entry: Entry) -> Sequence[torch.Tensor]:
        if entry.ours is None:
            return [torch.full(shape, entry.value) for shape in entry.theirs.values()]
        tensor = read_weight(checkpoint, run, entry.ours)
        progress.add(tensor.nbytes)
        return split(entry, tensor, model)

    write_tensors(out, listed, export.weight_layers, dtype, export.shard_bytes, read)


def _architecture_fields(model: ModelConfig, export: Export) -> dict[str, Any]:
    """The fields of ``config.json`` that say which code runs the model. Raises UserError where none can."""
    stock_sharing = BLOCKS[model.block].stock_sharing
    if stock_sharing is not None:
        if export.adaptive or export.architecture is not None:
            raise UserError(
                f"model.block is '{model.block}', which is exported as stock {stock_sharing.name}: leave --adaptive "
                "and --architecture out"
            )
        return stock_sharing.fields(model, export.sources)
    if export.is_stock:
        return stock_fields(stock_architecture(model, export.architecture), model)
    check_kinds(export.sources, model.layer_kinds)
    if export.adaptive and len(set(model.layer_kinds)) > 1:
        raise UserError(
            f"--adaptive is for models whose layers are of one kind, and this one has {model.layer_kinds[0]} and "
            f"{next(kind for kind in model.layer_kinds if kind != model.layer_kinds[0])}: leave it out"
        )
    if export.architecture is not None:
        raise UserError("--architecture is for a full export: a model that shares K/V runs code of its own")
    return shared_fields(model, export.sources, export.weight_layers, export.order if export.adaptive else None)


def copy_code(out: Path) -> None:
    """Put what runs a model that shares K/V beside its weights."""
    for name in CODE:
        shutil.copy(MODELS / name, out / name)


def _check_complete(checkpoint: Path, model: ModelConfig) -> None:
    """Raises UserError where a parameter is missing."""
    present = tensor_shapes(checkpoint)
    for entry in entries(model):
        if entry.ours is not None and f"model.{entry.ours}" not in present:
            raise UserError(f"checkpoint {checkpoint} has no tensor model.{entry.ours}")


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n")


def write_tensors(
    out: Path,
    listed: Sequence[Entry],
    weight_layers: Sequence[int],
    dtype: str,
    shard_bytes: int,
    read: Callable[[Entry], Sequence[torch.Tensor]],
) -> None:
    """Safetensors of all tensors of ``listed``, but for keys and values of layers that are none of ``weight_layers``.

    Args:
        read: from an `Entry` to its tensors in the order of ``entry.theirs``.
    """
    kept = {
        name: shape for entry in listed for name, shape in entry.theirs.items() if not is_left_out(name, weight_layers)
    }
    wanted = (entry for entry in listed if kept.keys() & entry.theirs.keys())
    pairs = (pair for entry in wanted for pair in zip(entry.theirs, read(entry)))
    write_weights(out, kept, dtype, shard_bytes, ((name, tensor) for name, tensor in pairs if name in kept))
