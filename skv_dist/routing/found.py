"""The file that ``skv-eval search --json`` writes, for exports and for training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skv_dist.errors import UserError
from skv_dist.files import parse_json
from skv_dist.routing.sharing import validate_order, validate_sharing_map

FORMAT = "skv-search/1"


@dataclass(frozen=True)
class FoundSets:
    """Attributes:
    file: where they were read.
    fingerprint: of the checkpoint that was searched: the SHA-256 of its manifest.
    order: all layers, the most needed first.
    entries: for each budget what was found and measured.
    """

    file: Path
    fingerprint: str
    order: tuple[int, ...]
    entries: list[dict[str, Any]]

    def entry(self, budget: float) -> dict[str, Any]:
        """What was found for a budget.

        Raises:
            UserError: it was not searched for.
        """
        for entry in self.entries:
            if abs(entry["budget"] - budget) < 1e-9:
                return entry
        searched = ", ".join(f"{entry['budget']:g}" for entry in self.entries)
        raise UserError(f"{self.file} holds nothing for a budget of {budget:g}: choose one of {searched}")


def _figures(entry: dict[str, Any]) -> list[Any]:
    """What is read of an entry beside its map."""
    return [entry["budget"], entry["rise"], entry["rise_error"], entry["evenly_spread"]["found_less_this"]]


def read_found(file: Path) -> FoundSets:
    """Raises:
    UserError: the file cannot be read, or is none of a search.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    try:
        if content["format"] != FORMAT:
            raise UserError(f"{file} has format {content['format']!r}, not {FORMAT!r}: search again with this version")
        order = validate_order([int(layer) for layer in content["order"]], len(content["order"]))
        for entry in content["budgets"]:
            validate_sharing_map([int(layer) for layer in entry["kv_source_layers"]], len(order))
            if not all(isinstance(number, (int, float)) for number in _figures(entry)):
                raise ValueError("a figure is no number")
        return FoundSets(file, str(content["fingerprint"]), order, content["budgets"])
    except UserError as error:
        raise UserError(f"{file}: {error}".replace(f"{file}: {file}", str(file))) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is not what skv-eval search --json writes: {error!r}") from error
