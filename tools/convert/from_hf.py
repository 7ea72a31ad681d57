"""A Hugging Face folder to a checkpoint that a run can start from (``checkpoint.init_from``)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from skv_dist import __version__
from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.save import write_alone
from skv_dist.checkpoint.shards import Shards
from skv_dist.config.load import dump_config
from skv_dist.config.model import ModelConfig
from skv_dist.config.run import RunConfig
from skv_dist.data.tokenizer import Tokenizer, load_tokenizer
from skv_dist.errors import UserError
from skv_dist.files import new_folder

from ..vocabulary import vocab_size
from .hf_config import model_section
from .hf_folder import HuggingFaceFolder
from .names import Entry, entries, fuse

MODEL_FILE = "model.yaml"
_IGNORED = "rotary_emb.inv_freq"  # in folders of older transformers; computed from config.json today


class _Lazy(Shards):
    """A full tensor that is made when DCP comes to write it."""

    make: Callable[[], torch.Tensor]

    @staticmethod
    def of(shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> "_Lazy":
        lazy = _Lazy(shape, {})
        lazy.make = make
        return lazy

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([0] * self.dim()), self.size())]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.make()


def from_hf(source: Path, out: Path, tokenizer_name: str | None) -> int:
    """Write ``out``; the number of parameters.

    ``out`` holds the weights, ``config.yaml`` (a whole run configuration to change) and ``model.yaml`` (what a run
    configuration names as its ``base``). One tensor is in memory at a time.

    Raises:
        UserError: what cannot be represented, or read.
    """
    folder = HuggingFaceFolder(source)
    section = model_section(folder.config)
    model = ModelConfig.model_validate(section)
    name = tokenizer_name or str(source.resolve())
    tokenizer = _tokenizer(name, vocab_size(model), given=tokenizer_name is not None)
    tensors = {f"model.{entry.ours}": _tensor(folder, entry, model) for entry in entries(model)}
    _refuse_unknown_tensors(folder, model)
    is_bf16 = str(folder.config.get("dtype", folder.config.get("torch_dtype"))) == "bfloat16"
    run = _starting_point(section, name, precision="bf16" if is_bf16 else "fp32")
    with new_folder(out) as checkpoint:
        base = {"model": section, "data": {"tokenizer": name}}
        (checkpoint / MODEL_FILE).write_text(yaml.safe_dump(base, sort_keys=False))
        (checkpoint / files.CONFIG).write_text(dump_config(run))
        files.write_state(checkpoint, _state(model, tokenizer, source))
        write_alone(checkpoint, tensors)
        files.seal(checkpoint, {path.name: files.digest(path) for path in checkpoint.iterdir()})
    return sum(tensor.numel() for tensor in tensors.values())


def _tokenizer(name: str, vocab_size: int, given: bool) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(name)
    except UserError as error:
        cure = "" if given else "; name one with --tokenizer"
        raise UserError(f"{error}{cure}") from error
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer '{name}' has {tokenizer.vocab_size} tokens, but config.json: vocab_size is {vocab_size}"
        )
    return tokenizer


def _tensor(folder: HuggingFaceFolder, entry: Entry, model: ModelConfig) -> _Lazy:
    """One of our parameters, read when it is written. Raises UserError where a part has another shape."""
    for part, shape in entry.theirs.items():
        if folder.shape(part) != shape:
            raise UserError(
                f"{folder.folder}: {part} is {list(folder.shape(part))}, but config.json makes it {list(shape)}"
            )
    shapes = list(entry.theirs.values())
    fused_shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return _Lazy.of(fused_shape, partial(_read_fused, folder, entry, model))


def _read_fused(folder: HuggingFaceFolder, entry: Entry, model: ModelConfig) -> torch.Tensor:
    return fuse(entry, [folder.read(part).float() for part in entry.theirs], model).contiguous()


def _refuse_unknown_tensors(folder: HuggingFaceFolder, model: ModelConfig) -> None:
    known = {part for entry in entries(model) for part in entry.theirs}
    if model.tie_embeddings:
        known.add("lm_head.weight")  # some folders repeat the embedding under this name
    unknown = sorted(name for name in folder.names() if name not in known and not name.endswith(_IGNORED))
    if unknown:
        raise UserError(f"{folder.folder}: tensor {unknown[0]} has no place in a {folder.config['model_type']} of ours")


def _state(model: ModelConfig, tokenizer: Tokenizer, source: Path) -> dict[str, Any]:
    """``state.json`` of a run that has not begun."""
    return {
        "step": 0,
        "samples": 0,
        "updates": 0,
        "guard": {},
        "vocab_size": vocab_size(model),
        "world_size": 1,
        "tokenizer": tokenizer.fingerprint(),
        "software": f"skv-dist {__version__}, from {source}",
        "layout": {},
    }


def _starting_point(model: dict[str, Any], tokenizer: str, precision: str) -> RunConfig:
    """A run of this model; what it is to learn from, and how, is the user's to say."""
    return RunConfig.model_validate(
        {
            "model": model,
            "data": {
                "tokenizer": tokenizer,
                "sequence_length": min(2048, model["max_position_embeddings"]),
                "sources": [{"path": "name your own text in data.sources", "format": "text"}],
            },
            "train": {
                "steps": 1000,
                "output_dir": "runs/finetune",
                "global_batch_size": 32,
                "micro_batch_size": 1,
                "precision": precision,
            },
            "optimizer": {"lr": 1e-5},
        }
    )
