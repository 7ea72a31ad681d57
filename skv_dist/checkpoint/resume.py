"""What a run starts from: an earlier checkpoint of its own, one that is named, or nothing."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.kinds import refuse_other_kinds
from skv_dist.checkpoint.load import verify_everywhere
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.parallel.processes.agree import first_error

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
# Keys of the model that change nothing of what its weights compute.
_FREE_FOR_WEIGHTS = {
    "model.max_position_embeddings",
    "model.attention_dropout",
    "model.hidden_dropout",
    "model.init_std",
}
_BOUND_SECTIONS = ("model", "routing", "data", "optimizer", "lora", "distillation")
_BOUND_TRAIN = ("steps", "epochs", "freeze", "seed", "global_batch_size", "micro_batch_size", "precision")


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
    if run.train.epochs is not None:  # from which the steps follow, once the data are open
        bound["train.steps"] = None
    return {key: value for key, value in bound.items() if key not in _FREE}


def _differences(before: dict[str, Any], now: dict[str, Any], allowed: set[str]) -> list[str]:
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in allowed
    ]


def check_same_run(run: RunConfig, folder: Path, fingerprints: Collection[str]) -> None:
    """Refuse to go on with another model, other data or another method. ``train.steps`` may grow.

    Args:
        fingerprints: of the tokenizer, with those that earlier versions gave it.

    Raises:
        UserError: naming the keys that differ and are not in ``checkpoint.allow_changed``.
    """
    allowed = set(run.checkpoint.allow_changed)
    before, now = _bound(files.read_config(folder)), _bound(run)
    if None not in (had := before["train.steps"], asked := now["train.steps"]) and asked > had:
        allowed.add("train.steps")  # more of the same
    changed = _differences(before, now, allowed)
    if files.read_state(folder)["tokenizer"] not in fingerprints and "data.tokenizer" not in allowed:
        changed.append("the content of data.tokenizer has changed")
    if changed:
        raise UserError(
            f"checkpoint {folder} belongs to another run: {'; '.join(changed)}; set train.output_dir to a new folder, "
            "checkpoint.resume=never, or name the keys in checkpoint.allow_changed"
        )


def check_same_model(key: str, run: RunConfig, folder: Path, fingerprints: Collection[str]) -> None:
    """Refuse weights that were made for another model or other tokens.

    Args:
        key: the configuration key that names the checkpoint.

    Raises:
        UserError: naming the keys that differ and are not in ``checkpoint.allow_changed``.
    """

    def shape(config: RunConfig) -> dict[str, Any]:
        values = _flat(config.model.model_dump(mode="json"), "model")
        return {key: value for key, value in values if key not in _FREE | _FREE_FOR_WEIGHTS}

    allowed = set(run.checkpoint.allow_changed)
    changed = _differences(shape(files.read_config(folder)), shape(run), allowed)
    if files.read_state(folder)["tokenizer"] not in fingerprints and "data.tokenizer" not in allowed:
        changed.append(f"data.tokenizer '{run.data.tokenizer}' is not the tokenizer that it was trained with")
    if changed:
        raise UserError(
            f"{key} {folder} holds another model: {'; '.join(changed)}; take the keys from its "
            f"{files.CONFIG}, or name them in checkpoint.allow_changed"
        )


def checked_weights(run: RunConfig, fingerprints: Collection[str]) -> Path | None:
    """The checkpoint whose weights the run begins with (``checkpoint.init_from``), whole and fitting. Collective.

    Raises:
        UserError: it is damaged, or holds another model.
    """
    named = run.checkpoint.init_from
    return None if named is None else _checked("checkpoint.init_from", named, run, fingerprints)


def checked_teacher(run: RunConfig, fingerprints: Collection[str]) -> Path | None:
    """The checkpoint that teaches (``distillation``), whole and fitting; None without one. Collective.

    Raises:
        UserError: it is damaged, or holds another model.
    """
    if not run.distillation.weight or run.teacher is None:
        return None
    key = "checkpoint.init_from" if run.distillation.teacher is None else "distillation.teacher"
    return _checked(key, run.teacher, run, fingerprints)


def _checked(key: str, named: str, run: RunConfig, fingerprints: Collection[str]) -> Path:
    folder = files.followed(Path(named).expanduser())
    _refuse_other_kinds(key, folder)
    verify_everywhere(folder)
    check_same_model(key, run, folder, fingerprints)
    adapters = files.read_config(folder).lora
    if key == "checkpoint.init_from" and adapters.rank and adapters != run.lora:
        raise UserError(
            f"{key} {folder} has adapters (lora.rank {adapters.rank}) that this run has not: take its lora section, or "
            "begin with the sums: skv-convert to-hf, and from-hf of what that writes"
        )
    return folder


def _refuse_other_kinds(key: str, folder: Path) -> None:
    """On every rank that sees the folder so. Raises UserError where it is no checkpoint, naming the key."""
    error = None
    try:
        refuse_other_kinds(folder)
    except UserError as problem:
        error = f"{key}: {problem}"
    if (agreed := first_error(error)) is not None:
        raise UserError(agreed)


def named_start(run: RunConfig) -> Path | None:
    """The checkpoint that ``checkpoint.resume`` names, if it names one."""
    resume = run.checkpoint.resume
    return None if resume in ("auto", "never") else Path(resume).expanduser().resolve()


def roll_backs(run: RunConfig, start: Path | None) -> list[str]:
    """What ``state.json`` keeps as ``roll_backs``: the checkpoints that ``resume`` named on the way to here, in order.

    With it a run that is started again with the same ``checkpoint.resume`` knows what it has written since.
    """
    before: list[str] = [] if start is None else files.read_state(start).get("roll_backs", [])
    asked = named_start(run)
    return before if asked is None or str(asked) in before else [*before, str(asked)]


def choose(run: RunConfig, root: Path, fingerprints: Collection[str]) -> Path | None:
    """The checkpoint to go on from; None to start afresh. Nothing on disk is changed. Collective.

    With ``auto`` a damaged one is named and passed over for the one before. A path must be whole; where this run has
    checkpoints of its own that came after it, it goes on from the newest of them.

    Raises:
        UserError: there are checkpoints and all are damaged, or one cannot be read, or it belongs to another run.
    """
    if run.checkpoint.resume == "never":
        return None
    asked = named_start(run)
    candidates = _candidates(root, asked)
    if asked is not None:
        candidates.append(asked)
    damaged: list[str] = []
    for folder in candidates:
        if folder == asked:  # which may be gone where the run has later ones of its own
            _refuse_other_kinds("checkpoint.resume", asked)
            files.step_of(asked)
        try:
            verify_everywhere(folder)
        except files.DamagedError as error:
            damaged.append(str(error))
            if dist.get_rank() == 0 and len(candidates) > 1:
                print(f"{error}; trying the one before", flush=True)
            continue
        check_same_run(run, folder, fingerprints)
        if asked not in (None, folder) and dist.get_rank() == 0:
            print(f"{folder} was written after {asked}; to go back to that once more, move it away", flush=True)
        return folder
    if asked is not None and len(damaged) == 1:
        raise UserError(damaged[0])
    if damaged:
        raise UserError(
            f"no checkpoint in {root} can be used: {'; '.join(damaged)}; nothing was changed: bring one back, or begin "
            "afresh in a new train.output_dir"
        )
    return None


def _candidates(root: Path, asked: Path | None) -> list[Path]:
    """This run's own checkpoints, newest first; where one is asked for, those that came after it. Collective."""
    names: list[str] = []
    error = None
    if dist.get_rank() == 0:
        try:
            names = [path.name for path in files.existing(root) if asked is None or _came_after(path, asked)]
        except UserError as problem:
            error = str(problem)
    if (agreed := first_error(error)) is not None:
        raise UserError(agreed)
    shared = [names]
    dist.broadcast_object_list(shared)
    return [root / name for name in shared[0]]


def _came_after(folder: Path, asked: Path) -> bool:
    try:
        return str(asked) in files.read_state(folder).get("roll_backs", [])
    except files.DamagedError:
        return False
