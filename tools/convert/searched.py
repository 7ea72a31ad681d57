"""The map that a search has found, for an export."""

from pathlib import Path

from skv_dist.checkpoint.folder import MANIFEST, digest
from skv_dist.errors import UserError
from skv_dist.routing.found import read_found

from .blocks import Map


def found_order(file: Path) -> tuple[int, ...]:
    """The order of the layers that ``skv-eval search`` found, the most needed first.

    Raises:
        UserError: the file is none of a search.
    """
    return tuple(read_found(file).order)


def found_map(file: Path, budget: float, checkpoint: Path, num_layers: int) -> tuple[Map, str]:
    """``kv_source_layers`` that ``skv-eval search`` found for a budget, and how it was chosen, for the card.

    Raises:
        UserError: the file is none of a search, of another checkpoint, or has nothing for this budget.
    """
    found = read_found(file)
    if found.fingerprint != digest(checkpoint / MANIFEST)["sha256"] or len(found.order) != num_layers:
        raise UserError(
            f"{file} was searched on another checkpoint than {checkpoint}: search again, or export what was searched"
        )
    entry = found.entry(budget)
    words = (
        f"found by `skv-eval search` for {budget:g} of the cache: {entry['rise']:.4f} ± {entry['rise_error']:.4f} "
        f"nats/token above the full cache on text that the search had not seen, where as many layers spread evenly "
        f"cost {entry['rise'] - entry['evenly_spread']['found_less_this']:.4f}"
    )
    return tuple(entry["kv_source_layers"]), words
