"""Reading a Hugging Face folder: ``config.json`` and safetensors, one file or many."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from skv_dist.errors import UserError

from ..weights import INDEX, SINGLE


def read_json(file: Path) -> dict[str, Any]:
    """Raises UserError where the file is missing or no JSON object."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} is not a JSON object")
    return fields


class HuggingFaceFolder:
    """Tensors of a folder by name, read when asked for.

    Raises:
        UserError: there are no safetensors, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
        self.folder = folder
        self.config = read_json(folder / "config.json")
        if (folder / INDEX).exists():
            places = read_json(folder / INDEX).get("weight_map")
            if not isinstance(places, dict):
                raise UserError(f"{folder / INDEX} has no weight_map")
            files = sorted(set(places.values()))
        elif (folder / SINGLE).exists():
            files = [SINGLE]
        else:
            raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}: only safetensors are read")
        self._files = {}
        for name in files:
            try:
                opened = safe_open(folder / name, framework="pt")
                self._files.update(dict.fromkeys(opened.keys(), opened))
            except (OSError, SafetensorError) as error:
                reason = "it is missing" if not (folder / name).exists() else f"it cannot be read ({error})"
                raise UserError(f"{folder / name}: {reason}") from error

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError where the folder has no such tensor."""
        if name not in self._files:
            raise UserError(f"{self.folder} has no tensor {name}")
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """As stored. Raises UserError where it cannot be read."""
        try:
            return self._files[name].get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise UserError(f"{self.folder}: tensor {name} cannot be read ({error})") from error
