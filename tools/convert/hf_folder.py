"""Reading a Hugging Face folder: ``config.json`` and safetensors, one file or many."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from skv_dist.errors import UserError

from ..engines.export.exported_config import read_object
from ..weights import INDEX, SINGLE
from .kinds import refuse_other_kinds

_STORED = ("F32", "BF16", "F16")


def read_json(file: Path) -> dict[str, Any]:
    """Raises UserError where the file is missing or no JSON object."""
    try:
        return read_object(file)
    except ValueError as error:
        raise UserError(str(error)) from error


class HuggingFaceFolder:
    """Tensors of a folder by name, read when asked for.

    Raises:
        UserError: there are no safetensors, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        refuse_other_kinds(folder)
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.notes: list[str] = []  # what was decided, where the folder says two things
        self._files = {}
        for name, wanted in self._parts().items():
            try:
                opened = safe_open(folder / name, framework="pt")
                held = set(opened.keys())
            except (OSError, SafetensorError) as error:
                reason = "it is missing" if not (folder / name).exists() else f"it cannot be read ({error})"
                raise UserError(f"{folder / name}: {reason}") from error
            missing = sorted(wanted - held)
            if missing:
                raise UserError(f"{folder / INDEX} says that {missing[0]} is in {name}, which does not hold it")
            self._files.update(dict.fromkeys(wanted or held, opened))

    def _parts(self) -> dict[str, set[str]]:
        """Files of weights, each with the tensors that the index places in it (none: all)."""
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.exists():
            if index.exists():
                self.notes.append(f"{single} is read, as transformers does; {INDEX} beside it and its files are not")
            return {SINGLE: set()}
        if not index.exists():
            shards = sorted(path.name for path in self.folder.glob("model-*-of-*.safetensors"))
            if shards:
                raise UserError(f"{self.folder} holds {shards[0]}, but {INDEX}, which lists such files, is missing")
            raise UserError(f"{self.folder} holds neither {SINGLE} nor {INDEX}: only safetensors are read")
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{index} has no weight_map")
        parts: dict[str, set[str]] = {}
        for tensor, name in places.items():
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
                raise UserError(f"{index}: weight_map places {tensor} in {name!r}, which is no file beside it")
            parts.setdefault(name, set()).add(tensor)
        return dict(sorted(parts.items()))

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError where the folder has no such tensor."""
        if name not in self._files:
            raise UserError(f"{self.folder} has no tensor {name}")
        return tuple(self._files[name].get_slice(name).get_shape())

    def check_dtypes(self) -> None:
        """Raises UserError where a tensor is of another type than ours: quantized, perhaps, with scales elsewhere."""
        for name, file in sorted(self._files.items()):
            dtype = file.get_slice(name).get_dtype()
            if dtype not in _STORED:
                raise UserError(
                    f"{self.folder}: tensor {name} is {dtype}, but only {', '.join(_STORED)} can be converted"
                )

    def main_dtype(self) -> str:
        """The type, as safetensors call it, of the embedding, which decides on the precision to begin with."""
        name = "model.embed_tokens.weight"
        return str(self._files[name].get_slice(name).get_dtype()) if name in self._files else ""

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same, shape and content."""
        return self.shape(one) == self.shape(other) and torch.equal(self.read(one), self.read(other))

    def read(self, name: str) -> torch.Tensor:
        """As stored. Raises UserError where it cannot be read."""
        try:
            return self._files[name].get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise UserError(f"{self.folder}: tensor {name} cannot be read ({error})") from error
