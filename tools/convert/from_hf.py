"""A Hugging Face folder to a checkpoint that a run can start from (``checkpoint.init_from``)."""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from skv_dist import __version__
from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.save import write_alone
from skv_dist.checkpoint.shards import Shards
from skv_dist.checkpoint.travelling import ORIGIN, TOKENIZER, Files, travelling_files, write_travelling
from skv_dist.config.load import dump_config
from skv_dist.config.model import ModelConfig
from skv_dist.config.run import RunConfig
from skv_dist.config.yaml_file import dump
from skv_dist.data.tokenizer import Tokenizer, load_tokenizer
from skv_dist.errors import UserError
from skv_dist.files import new_folder

from ..vocabulary import vocab_size
from .families import FAMILIES
from .hf_config import complete, model_section
from .hf_folder import HuggingFaceFolder
from .names import Entry, entries, fuse
from .origin import read_origin
from .progress import Progress

MODEL_FILE = "model.yaml"
_HEAD = "lm_head.weight"
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


class Start(NamedTuple):
    """What `write_start` wrote.

    Attributes:
        notes: what it decided where the folder says two things.
    """

    num_parameters: int
    notes: list[str]
    tokenizer: Tokenizer


def from_hf(source: Path, out: Path, tokenizer_name: str | None) -> int:
    """Make the folder ``out`` with `write_start`, and nothing where that fails; the number of parameters.

    Raises:
        UserError: what cannot be represented, read or written.
    """
    with new_folder(out) as folder:
        return write_start(source, folder, tokenizer_name, out).num_parameters


def write_start(source: Path, out: Path, tokenizer_name: str | None, name: Path, hub_name: str | None = None) -> Start:
    """Write into the folder ``out``.

    ``out`` then holds the weights, the tokenizer, ``origin.json``, ``config.yaml`` (a whole run configuration to
    change) and ``model.yaml`` (what a run configuration names as its ``base``). One tensor is in memory at a time.

    Args:
        name: what ``out`` will be called.
        hub_name: of the model, where ``source`` is the hub's.

    Raises:
        UserError: what cannot be represented, or read.
    """
    folder = HuggingFaceFolder(source)
    folder.check_dtypes()
    config = complete(folder.config if hub_name is None else {**folder.config, "_name_or_path": hub_name})
    section = model_section(config)
    if section["tie_embeddings"] and _has_own_head(folder):
        section["tie_embeddings"] = False
        folder.notes.append(
            "config.json says tie_word_embeddings, but lm_head.weight differs from the embedding: read as not tied, as "
            "transformers does"
        )
    model = ModelConfig.model_validate(section)
    tokenizer = _tokenizer(tokenizer_name or str(source.absolute()), vocab_size(model), tokenizer_name is not None)
    progress = Progress(str(name), _num_bytes(model))
    listed = list(entries(model, FAMILIES[config["model_type"]].joined))
    tensors = {f"model.{entry.ours}": _tensor(folder, entry, model, progress) for entry in listed}
    _refuse_unknown_tensors(folder, model, listed)
    travelling = {**travelling_files(tokenizer), **_origin_file(source, config, tokenizer, tokenizer_name)}
    path = str(name.absolute() / TOKENIZER) if tokenizer.files() else tokenizer.name
    run = _starting_point(section, path, precision="bf16" if folder.main_dtype() == "BF16" else "fp32")
    base = {"model": section, "data": {"tokenizer": path}}
    (out / MODEL_FILE).write_text(dump(base))
    (out / files.CONFIG).write_text(dump_config(run))
    write_travelling(out, travelling)
    files.write_state(out, _state(model, tokenizer, source))
    write_alone(out, tensors)
    files.seal(out, files.digests(out))
    return Start(sum(tensor.numel() for tensor in tensors.values()), folder.notes, tokenizer)


def _has_own_head(folder: HuggingFaceFolder) -> bool:
    return _HEAD in folder.names() and not folder.equal(_HEAD, "model.embed_tokens.weight")


def _num_bytes(model: ModelConfig) -> int:
    return 4 * sum(math.prod(shape) for entry in entries(model) for shape in entry.theirs.values())


def _origin_file(source: Path, config: dict[str, Any], tokenizer: Tokenizer, given: str | None) -> Files:
    """``origin.json``; its ``tokenizer`` is the one in whose ids ``generation_config`` speaks."""
    belongs: str | None = tokenizer.fingerprint()
    if given is not None:
        try:
            belongs = load_tokenizer(str(source.absolute())).fingerprint()
        except UserError:  # it has none: the given one may be its own, if it is not bytes
            belongs = None if given == "byte" else belongs
    origin = {**read_origin(source, config), "tokenizer": belongs}
    return {ORIGIN: (json.dumps(origin, indent=1) + "\n").encode()}


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


def _tensor(folder: HuggingFaceFolder, entry: Entry, model: ModelConfig, progress: Progress) -> _Lazy:
    """One of our parameters, read when it is written. Raises UserError where a part has another shape."""
    for part, shape in entry.theirs.items():
        if folder.shape(part) != shape:
            raise UserError(
                f"{folder.folder}: {part} is {list(folder.shape(part))}, but config.json makes it {list(shape)}"
            )
    shapes = list(entry.theirs.values())
    fused_shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return _Lazy.of(fused_shape, partial(_read_fused, folder, entry, model, progress))


def _read_fused(folder: HuggingFaceFolder, entry: Entry, model: ModelConfig, progress: Progress) -> torch.Tensor:
    fused = fuse(entry, [folder.read(part).float() for part in entry.theirs], model).contiguous()
    progress.add(fused.nbytes)
    return fused


def _refuse_unknown_tensors(folder: HuggingFaceFolder, model: ModelConfig, listed: Sequence[Entry]) -> None:
    known = {part for entry in listed for part in entry.theirs}
    if model.tie_embeddings:
        known.add(_HEAD)  # some folders repeat the embedding under this name
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
