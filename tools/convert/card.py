"""The README of an exported folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skv_dist import __version__
from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.frozen_model import config_of

from .blocks import BLOCKS
from .findings import Finding, table
from .hf_config import OUR_MODEL_TYPE
from .hf_folder import read_json
from .to_hf import Export

_PAPER = "[arXiv 2604.22782](https://arxiv.org/abs/2604.22782)"


def write_card(checkpoint: Path, folder: Path, name: str, export: Export, findings: Sequence[Finding]) -> None:
    """Write ``README.md`` into ``folder``, which is to be called ``name``."""
    text = model_card(checkpoint, name, read_json(folder / "config.json"), export, findings)
    (folder / "README.md").write_text(text, encoding="utf-8")


def model_card(checkpoint: Path, name: str, config: dict[str, Any], export: Export, findings: Sequence[Finding]) -> str:
    """Markdown.

    Args:
        name: of the exported folder.
        config: its ``config.json``.
    """
    step, block = int(files.read_state(checkpoint)["step"]), config_of(checkpoint).model.block
    lines = ["---", "library_name: transformers", "tags: [kv-cache-sharing, skv-dist]", "---", "", f"# {name}", ""]
    lines += [_summary(config, export), ""]
    lines += [
        f"Written by skv-dist {__version__} from step {step} of a run. Method: stochastic KV routing, {_PAPER}.",
        "",
    ]
    if not export.is_stock:
        lines += [*_row_table(["layer", *range(len(export.sources))], ["reads the K/V of", *export.sources]), ""]
    lines += ["## Measured", "", *_comparison(config, findings), "", *_losses(checkpoint, step)]
    lines += ["## Loading", "", *_loading_code(name, config, export), "", *_engines(name, config, block)]
    return "\n".join(lines) + "\n"


def _summary(config: dict[str, Any], export: Export) -> str:
    num_layers, owners = len(export.sources), sorted(set(export.sources))
    if export.is_stock:
        return f"Every layer keeps its own KV cache: stock `{config['architectures'][0]}`, no custom code."
    if export.adaptive:
        return (
            f"The KV cache of this model can be cut in depth when it is loaded: any of its {num_layers} layers may "
            f"read the keys and values of an earlier one. Unless told otherwise, layers {owners} keep a cache "
            "(`kv_source_layers` in config.json)."
        )
    return f"{len(owners)} of {num_layers} layers keep a KV cache; the others read that of an earlier layer."


def _comparison(config: dict[str, Any], findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return ["Not verified: `skv-convert verify CHECKPOINT FOLDER`."]
    measured = f"cache held in `{config['dtype']}` ({findings[0].how})"
    return [f"Against the checkpoint, both in float32; {measured}.", "", table(findings)]


def _losses(checkpoint: Path, step: int) -> list[str]:
    """The last evaluation of the run up to ``step``, from its ``metrics.jsonl``; empty without one."""
    file = checkpoint.parent.parent / "metrics.jsonl"
    losses: dict[str, float] = {}
    if file.is_file():
        for metrics in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            evaluated = {key: value for key, value in metrics.items() if key.startswith("eval/loss@")}
            if evaluated and metrics["step"] <= step:
                losses, last_step = evaluated, metrics["step"]
    if not losses:
        return []
    retentions = [key.removeprefix("eval/loss@") for key in losses]
    return [
        f"Validation loss (nats per token) at step {last_step}, by the part of layers that keep a cache:",
        "",
        *_row_table(retentions, [f"{loss:.4f}" for loss in losses.values()]),
        "",
    ]


def _loading_code(name: str, config: dict[str, Any], export: Export) -> list[str]:
    custom = ", trust_remote_code=True" if config["model_type"] == OUR_MODEL_TYPE else ""
    load = f'model = AutoModelForCausalLM.from_pretrained("{name}"{custom}'
    lines = ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{name}")', f"{load})"]
    if export.adaptive:
        lines += [f"{load}, kv_retention=0.5)  # groups of two layers"]
        lines += [f"{load}, kv_source_layers={list(export.sources)})"]
    return [*lines, "```"]


def _engines(name: str, config: dict[str, Any], block: str) -> list[str]:
    if config["model_type"] == OUR_MODEL_TYPE:
        return [
            "- transformers 5.17 to 5.23: as above; layers that share hold no cache.",
            f"- vLLM: `pip install 'skv-dist[vllm]'`, then `vllm serve {name} --trust-remote-code`. **Without this "
            "plugin vLLM runs the model and saves nothing**: its stock Transformers backend allocates a cache for "
            "every layer.",
            f"- ONNX Runtime GenAI: `skv-convert to-onnx {name} OUT`.",
            f'- MLX: `mlx_lm.load("{name}", trust_remote_code=True)` runs `mlx_skv.py` of this folder.',
            "- llama.cpp: cannot express the map; not supported (models of Gemma 4's block are).",
        ]
    stock_sharing = BLOCKS[block].stock_sharing
    return ["Any engine that knows the stock architecture loads it.", *([stock_sharing.note] if stock_sharing else [])]


def _row_table(head: Sequence[object], row: Sequence[object]) -> list[str]:
    """A Markdown table of one row."""
    return [
        "| " + " | ".join(map(str, head)) + " |",
        "|---" * len(head) + "|",
        "| " + " | ".join(map(str, row)) + " |",
    ]
