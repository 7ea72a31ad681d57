"""A plain checkpoint of the weights: full fp32 tensors under global names in safetensors files, and the run's config.

Written from any layout and read into any layout, one parameter at a time.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file

from skv_dist.config.load import dump_config
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.model.sharding import full_shape, kind_of, take
from skv_dist.parallel.build import partitioned_shape
from skv_dist.parallel.engine import Engine
from skv_dist.parallel.gather import full_parameters

INDEX = "model.safetensors.index.json"
FILE_BYTES = 4 * 2**30


def save_weights(engine: Engine, run: RunConfig, vocab_size: int, folder: Path) -> None:
    """Write ``folder``, which becomes visible only when it is complete. Collective.

    Raises:
        UserError: the folder cannot be written.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    first = dist.get_rank() == 0
    places: dict[str, str] = {}
    waiting: dict[str, torch.Tensor] = {}
    problem: OSError | None = None

    def flush() -> None:
        if waiting:
            file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
            save_file(waiting, aside / file)
            places.update(dict.fromkeys(waiting, file))
            waiting.clear()

    try:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        # All ranks walk through all parameters, whatever happens to the files on the first: it is a collective.
        for name, value in full_parameters(engine, run, vocab_size):
            if first and problem is None:
                waiting[name] = value.cpu().contiguous()
                if sum(tensor.nbytes for tensor in waiting.values()) > FILE_BYTES:
                    try:
                        flush()
                    except OSError as error:
                        problem = error
        if first:
            if problem is not None:
                raise problem
            flush()
            (aside / INDEX).write_text(json.dumps({"metadata": {"vocab_size": vocab_size}, "weight_map": places}))
            (aside / "config.yaml").write_text(dump_config(run))
            os.replace(aside, folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error


def read_index(folder: Path) -> tuple[dict[str, str], int]:
    """File of each parameter, and the vocabulary's size without padding.

    Raises:
        UserError: ``folder`` is not a checkpoint.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        return dict(index["weight_map"]), int(index["metadata"]["vocab_size"])
    except OSError as error:
        raise UserError(f"{folder} is not a checkpoint: {INDEX} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: {INDEX} is damaged") from error


def load_weights(engine: Engine, run: RunConfig, vocab_size: int, folder: Path) -> None:
    """Set the engine's parameters from `save_weights`'s folder. Collective over data-parallel ranks.

    Raises:
        UserError: a parameter or file is missing, damaged or of another shape.
    """
    places, _ = read_index(folder)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()

    def values() -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        for name, parameter in engine.root.named():
            if name not in places:
                raise UserError(f"{folder}: parameter '{name}' is missing")
            try:
                with safe_open(folder / places[name], framework="pt") as file:
                    full = file.get_tensor(name)
            except Exception as error:  # safetensors raises several kinds for a damaged file
                raise UserError(f"{folder / places[name]} is missing or damaged (parameter '{name}')") from error
            local = partitioned_shape(parameter)
            kind = kind_of(name, run.model.gated)
            expected = full_shape(local, kind, size, vocab_size)
            if tuple(full.shape) != expected:
                raise UserError(f"{folder}: '{name}' has shape {list(full.shape)}, the model wants {list(expected)}")
            yield parameter, take(full, kind, rank, size, local)

    engine.assign(values())
