"""Versions of what a result depends on, as reports, checkpoints and benchmark pages name them."""

import importlib.metadata
import platform
from collections.abc import Sequence

from skv_dist import __version__

_TRAINING = ("torch", "megatron-core", "deepspeed")


def package_versions(names: Sequence[str] = _TRAINING) -> str:
    """``torch 2.13.0, megatron-core 0.16.1, ...``; packages that are not installed are left out."""
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(versions)


def software() -> str:
    """Python, skv-dist and the packages that training stands on."""
    return f"Python {platform.python_version()}, skv-dist {__version__}, {package_versions()}"
