"""A Hugging Face folder to a checkpoint that a run can start from (``checkpoint.init_from``)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from skv_dist import __version__
from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.shards import Shards
from skv_dist.config.load import dump_config
from skv_dist.config.model import ModelConfig
from skv_dist.config.run import RunConfig
from skv_dist.data.tokenizer import load_tokenizer
from skv_dist.errors import UserError
from skv_dist.files import new_folder

from .hf_config import model_section
from .hf_folder import HuggingFaceFolder
from .names import entries, fuse, shapes

MODEL_FILE = "model.yaml"
_IGNORED = ("rotary_emb.inv_freq",)  # in folders of older transformers; computed from config.json today


class _Lazy(Shards):
    """A full tensor that is made when DCP comes to write it."""

    make: Callable[[], torch.Tensor]

    @staticmethod
    def of(shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> "_Lazy":
        made = _Lazy(shape, torch.empty(0), [])
        made.make = make
        return made

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
    tokenizer = _tokenizer(name, given=tokenizer_name is not None)
    if tokenizer.vocab_size > section["vocab_size"]:
        raise UserError(
            f"the tokenizer '{name}' has {tokenizer.vocab_size} tokens, but config.json: vocab_size is "
            f"{section['vocab_size']}"
        )
    tensors = {}
    known = set(_IGNORED)
    for entry in entries(model):
        parts = shapes(entry, model, section["vocab_size"])
        for part, shape in zip(entry.theirs, parts):
            found = folder.shape(part)
            if found != shape:
                raise UserError(f"{source}: {part} is {list(found)}, but config.json makes it {list(shape)}")
        known.update(entry.theirs)

        def make(entry: Any = entry) -> torch.Tensor:
            return fuse(entry, [folder.read(part).float() for part in entry.theirs], model).contiguous()

        whole = (sum(shape[0] for shape in parts), *parts[0][1:])
        tensors[f"model.{entry.ours}"] = _Lazy.of(whole, make)
    if model.tie_embeddings:
        known.add("lm_head.weight")  # some folders repeat the embedding under this name
    unknown = sorted(n for n in folder.names() if n not in known and not n.endswith(_IGNORED))
    if unknown:
        raise UserError(f"{source}: tensor {unknown[0]} has no place in a {folder.config['model_type']} of ours")

    bf16 = str(folder.config.get("dtype", folder.config.get("torch_dtype"))) == "bfloat16"
    run = _starting_point(section, name, precision="bf16" if bf16 else "fp32")
    with new_folder(out) as aside:
        base = {"model": section, "data": {"tokenizer": name}}
        (aside / MODEL_FILE).write_text(yaml.safe_dump(base, sort_keys=False))
        (aside / files.CONFIG).write_text(dump_config(run))
        state = {
            "step": 0,
            "samples": 0,
            "updates": 0,
            "guard": {},
            "vocab_size": section["vocab_size"],
            "world_size": 1,
            "tokenizer": tokenizer.fingerprint(),
            "software": f"skv-dist {__version__}, from {source}",
            "layout": {},
        }
        files.write_state(aside, state)
        writer = dcp.FileSystemWriter(aside, sync_files=True)
        dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
        files.seal(aside, {path.name: files.digest(path) for path in aside.iterdir()})
    return sum(tensor.numel() for tensor in tensors.values())


def _tokenizer(name: str, given: bool) -> Any:
    try:
        return load_tokenizer(name)
    except UserError as error:
        cure = "" if given else "; name one with --tokenizer"
        raise UserError(f"{error}{cure}") from error


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
