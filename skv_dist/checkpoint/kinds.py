"""What a folder is that was given where a checkpoint is wanted, and which checkpoint is meant."""

from pathlib import Path

from skv_dist.checkpoint import folder as files
from skv_dist.data.token_set import META, TOKENS
from skv_dist.errors import UserError
from skv_dist.files import parse_json


def checkpoint_at(path: Path) -> Path:
    """``path`` if it is a checkpoint, or the one that it names (``RUN/checkpoints/best``); of a run, or of its folder
    of checkpoints, the newest.

    Raises:
        UserError: it is neither; saying what it is, and what to do.
    """
    path = files.followed(path)
    if (path / files.MANIFEST).is_file():
        return path
    for root in (path / files.CHECKPOINTS, path):
        if root.is_dir() and (complete := files.existing(root)):
            return complete[0]
    refuse_other_kinds(path)
    return path


def refuse_other_kinds(path: Path) -> None:
    """Return if ``path`` is a checkpoint, whole or damaged.

    Raises:
        UserError: it is something else, or is not there; with what to do instead.
    """
    if not path.is_dir():
        raise UserError(_not_there(path))
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if names & {files.MANIFEST, files.STATE, ".metadata"}:
        return
    raise UserError(f"{path} is no checkpoint: {_kind(path, names)}")


def _not_there(path: Path) -> str:
    if path.exists():
        return f"checkpoint {path} is a file: a checkpoint is a folder such as RUN/checkpoints/step_00000100"
    missing = f"checkpoint {path} does not exist"
    for root in (path.parent, path.parent / files.CHECKPOINTS):
        if root.is_dir() and (complete := files.existing(root)):
            others = ", ".join(folder.name for folder in complete[:5])
            more = f" and {len(complete) - 5} earlier ones" if len(complete) > 5 else ""
            return f"{missing}; {root} holds {others}{more}"
    return missing


def _kind(path: Path, names: set[str]) -> str:
    """In one clause what the folder is, and what to do instead."""
    for root in (path / files.CHECKPOINTS, path):
        if root.is_dir() and (complete := files.existing(root)):
            whose = "it is the folder of a run" if root != path else "it holds the checkpoints of a run"
            return f"{whose}; name one of them, such as the newest, {complete[0]}"
    if files.CHECKPOINTS in names or {files.CONFIG, files.METRICS} <= names:
        return "it is the folder of a run that has not written one yet"
    if "genai_config.json" in names:
        return "it is a folder for ONNX Runtime GenAI; name the checkpoint that it was exported from"
    if "config.json" in names:
        return _of_hugging_face(path)
    if names.issuperset((META, TOKENS)):
        return "it holds prepared data, which belongs into data.sources"
    if "tokenizer.json" in names or "tokenizer_config.json" in names:
        return "it holds a tokenizer, which belongs into data.tokenizer"
    return "it is empty" if not names else f"neither {files.MANIFEST} nor {files.STATE} is there"


def _of_hugging_face(path: Path) -> str:
    try:
        config = parse_json((path / "config.json").read_text(encoding="utf-8"))
        exported = config.get("model_type") == "skv"
    except (OSError, ValueError, AttributeError):
        exported = False
    if exported:
        return "it is an exported folder; name the checkpoint that it was exported from"
    return f"it is a Hugging Face folder; `skv-convert from-hf {path} OUT` makes a checkpoint of it"
