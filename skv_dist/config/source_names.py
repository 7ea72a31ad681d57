"""Short names of data sources, under which metrics.jsonl has their losses."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from skv_dist.config.data import SourceConfig

_SUFFIXES = re.compile(r"(\.(txt|jsonl|ndjson|json|parquet))?(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """One for each source: the last part of its path that is no pattern, without suffixes.

    Where several would have the same, as many folders above it come before it as tell them apart; what no folder tells
    apart is numbered.
    """
    paths = [_parts(source) for source in sources]
    lengths = [1] * len(paths)
    while True:
        names = ["-".join(parts[-length:]) for parts, length in zip(paths, lengths)]
        uses = Counter(names)
        longer = [i for i, name in enumerate(names) if uses[name] > 1 and lengths[i] < len(paths[i])]
        if not longer:
            return _numbered(names)
        for i in longer:
            lengths[i] += 1


def _parts(source: SourceConfig) -> list[str]:
    """What a name is made of: the path's folders, and last its own name."""
    parts = [part for part in PurePosixPath(source.path).parts if not re.search(r"[*?\[]", part)]
    if parts:
        parts[-1] = _SUFFIXES.sub("", parts[-1])
    if source.format == "hub" and source.name is not None:
        parts[-1:] = ["-".join([*parts[-1:], source.name])]
    # "/" would read as one more level of a metric's name.
    named = [re.sub(r"[^\w.-]+", "_", part).strip("_.") for part in parts]
    return [part for part in named if part] or ["data"]


def _numbered(names: Sequence[str]) -> list[str]:
    numbered: list[str] = []
    for name in names:
        own, number = name, 1
        while own in numbered or (number > 1 and own in names):
            number += 1
            own = f"{name}-{number}"
        numbered.append(own)
    return numbered
