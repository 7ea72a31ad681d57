"""What a run starts from: an earlier checkpoint of its own, one that is named, or nothing."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import verify_everywhere
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError

# Keys that may change between one part of a run and the next without making it another run.
_FREE = {
    "model.transformer_impl",
    "model.make_vocab_size_divisible_by",
    "data.cache_dir",
    "data.max_skipped",
    "data.prepare_workers",
    "data.prefetch_steps",
    "data.tokenizer",  # its content is compared, wherever it lies
}
_BOUND_SECTIONS = ("model", "routing", "data", "optimizer")
_BOUND_TRAIN = ("steps", "seed", "global_batch_size", "micro_batch_size", "precision")


def _flat(values: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}")
    else:
        yield name, values


def _bound(run: RunConfig) -> dict[str, Any]:
    """Keys that make a run what it is."""
    values = run.model_dump(mode="json")
    bound = {key: value for section in _BOUND_SECTIONS for key, value in _flat(values[section], section)}
    bound.update({f"train.{key}": values["train"][key] for key in _BOUND_TRAIN})
    return {key: value for key, value in bound.items() if key not in _FREE}


def check_same_run(run: RunConfig, folder: Path, fingerprints: Collection[str]) -> None:
    """Refuse to go on with another model, other data or another method.

    Args:
        fingerprints: of the tokenizer, with those that earlier versions gave it.

    Raises:
        UserError: naming the keys that differ and are not in ``checkpoint.allow_changed``.
    """
    before, now = _bound(files.read_config(folder)), _bound(run)
    allowed = set(run.checkpoint.allow_changed)
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in allowed
    ]
    if files.read_state(folder)["tokenizer"] not in fingerprints and "data.tokenizer" not in allowed:
        changed.append("the content of data.tokenizer has changed")
    if changed:
        raise UserError(
            f"checkpoint {folder} belongs to another run: {'; '.join(changed)}; set train.output_dir to a new folder, "
            "checkpoint.resume=never, or name the keys in checkpoint.allow_changed"
        )


def choose(run: RunConfig, root: Path, fingerprints: Collection[str]) -> Path | None:
    """The checkpoint to go on from; None to start afresh. Collective.

    With ``auto`` a damaged one is named and passed over for the one before. A path must be whole.

    Raises:
        UserError: it is damaged, or belongs to another run.
    """
    resume = run.checkpoint.resume
    if resume == "never":
        return None
    if resume != "auto":
        folder = Path(resume).expanduser()
        files.step_of(folder)
        verify_everywhere(folder)
        check_same_run(run, folder, fingerprints)
        return folder
    names = [[path.name for path in files.existing(root)]]
    dist.broadcast_object_list(names)
    for folder in (root / name for name in names[0]):
        try:
            verify_everywhere(folder)
        except UserError as error:
            if dist.get_rank() == 0:
                print(f"{error}; trying the one before", flush=True)
            continue
        check_same_run(run, folder, fingerprints)
        return folder
    return None
