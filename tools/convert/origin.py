"""What a Hugging Face folder says of its model beside the weights: whose it is, and how it is sampled from."""

import re
from pathlib import Path
from typing import Any

import yaml

from skv_dist.errors import UserError

from .hf_folder import read_json

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_KEPT = ("_from_model_config", "transformers_version")


def read_origin(source: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``base_model`` and ``license``, where they are known, ``folder``, and ``generation_config``.

    Raises:
        UserError: ``generation_config.json`` is there and cannot be read.
    """
    told = _front_matter(source / "README.md")
    name = config.get("_name_or_path")
    origin: dict[str, Any] = {"folder": source.absolute().name}
    if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not Path(name).exists():
        origin["base_model"] = name
    if isinstance(told.get("license"), str):
        origin["license"] = told["license"]
    return {**origin, "generation_config": _generation_config(source, config)}


def _generation_config(source: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``generation_config.json``, or what transformers makes of ``config.json`` where there is none."""
    file = source / "generation_config.json"
    settings = read_json(file) if file.exists() else {key: config[key] for key in _TOKENS if key in config}
    ends = settings.get("eos_token_id")
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [0 if ends is None else ends])):
        raise UserError(f"{file if file.exists() else 'config.json'}: eos_token_id is {ends!r}: ids are whole numbers")
    return {key: value for key, value in settings.items() if key not in _NOT_KEPT and value is not None}


def _front_matter(readme: Path) -> dict[str, Any]:
    """The fields at the head of a model card; none where it has none that can be read."""
    try:
        text = readme.read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return head if isinstance(head, dict) else {}
