"""Settings of small runs, and what comes out of them."""

from pathlib import Path
from typing import Any

from tests import jobs


def settings(text: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    given = jobs.config(**sections)
    given["data"] = {
        "sequence_length": 16, "sources": [{"path": str(text / "*.txt"), "format": "text"}],
        "validation_fraction": 0.2, "cache_dir": str(text / "cache"), **sections.get("data", {}),
    }  # fmt: skip
    given["train"] = {**given["train"], "steps": 6, "output_dir": str(out), "progress": False}
    given["train"].update(sections.get("train", {}))
    given["eval"] = {"every": 3, "samples": 7, "retention": [1.0, 0.5], **sections.get("eval", {})}
    return given


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines] + [v for line in lines for k, v in line.items() if k.startswith("eval/")]
