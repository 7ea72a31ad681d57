"""What was given where a folder of transformers is wanted, and what to do instead."""

from pathlib import Path

from skv_dist.checkpoint.folder import CHECKPOINTS, MANIFEST
from skv_dist.errors import UserError

_GGUF = "`skv-convert from-hf` makes a checkpoint of one"


def refuse_other_kinds(folder: Path) -> None:
    """Return if ``folder`` may be one of transformers: it holds a ``config.json``, or nothing that is known.

    Raises:
        UserError: it is something else, or is not there; with what to do instead.
    """
    if not folder.is_dir():
        raise UserError(_no_folder(folder))
    if (folder / "config.json").exists():
        return
    if (folder / MANIFEST).exists() or (folder / CHECKPOINTS).is_dir():
        what = "a checkpoint" if (folder / MANIFEST).exists() else "the folder of a run"
        raise UserError(f"{folder} is {what}: `skv-convert to-hf {folder} OUT` makes a folder for engines of it")
    if (folder / "genai_config.json").exists():
        raise UserError(f"{folder} is a folder for ONNX Runtime GenAI: name the one that it was made from")
    if any(folder.glob("*.gguf")):
        raise UserError(f"{folder} holds GGUF and no config.json: {_GGUF}")


def _no_folder(folder: Path) -> str:
    if folder.is_file():
        return f"{folder} is a GGUF file: {_GGUF}" if folder.suffix == ".gguf" else f"{folder} is a file, not a folder"
    if len(folder.parts) == 2 and not folder.is_absolute() and not folder.parent.exists():
        return (
            f"{folder} is not a folder; a model of the hub comes by `hf download {folder}`, or by `skv-convert from-hf`"
        )
    return f"{folder} is not a folder"
