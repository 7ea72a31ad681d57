"""The README of an exported folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from skv_dist import __version__
from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.frozen_model import config_of
from skv_dist.checkpoint.travelling import origin_of
from skv_dist.evaluation.comparison import losses_by_retention
from skv_dist.routing import RoutePlan

from .blocks import BLOCKS
from .findings import Finding, table
from .hf_config import OUR_MODEL_TYPE
from .hf_folder import read_json
from .to_hf import Export

_PAPER = "[arXiv 2604.22782](https://arxiv.org/abs/2604.22782)"


def write_card(checkpoint: Path, folder: Path, name: str, export: Export, findings: Sequence[Finding]) -> None:
    """Write ``README.md`` into ``folder``, which is to be called ``name``."""
    chats = (folder / "chat_template.jinja").exists()
    text = model_card(checkpoint, name, read_json(folder / "config.json"), export, findings, chats)
    (folder / "README.md").write_text(text, encoding="utf-8")


def model_card(
    checkpoint: Path,
    name: str,
    config: dict[str, Any],
    export: Export,
    findings: Sequence[Finding],
    chats: bool,
) -> str:
    """Markdown.

    Args:
        name: of the exported folder.
        config: its ``config.json``.
        chats: whether its tokenizer has a chat template.
    """
    step, block = int(files.read_state(checkpoint)["step"]), config_of(checkpoint).model.block
    origin = origin_of(checkpoint)
    lines = [*_front_matter(origin), "", f"# {name}", "", _summary(config, export), ""]
    lines += [
        f"Written by skv-dist {__version__} from step {step} of a run. Method: stochastic KV routing, {_PAPER}.",
        *_lineage(origin),
        "",
    ]
    if not export.is_stock:
        lines += [*_row_table(["layer", *range(len(export.sources))], ["reads the K/V of", *export.sources]), ""]
    if export.chosen:
        lines += [f"This map was {export.chosen}." if "found" in export.chosen else f"This map: {export.chosen}.", ""]
    if config["model_type"] == OUR_MODEL_TYPE:
        lines += _prompts(export)
    lines += ["## Measured", "", *_comparison(config, findings), "", *_losses(checkpoint, step)]
    lines += ["## Loading", "", *_loading_code(name, config, export, chats), "", *_engines(name, config, block)]
    return "\n".join(lines) + "\n"


def _front_matter(origin: dict[str, Any]) -> list[str]:
    """What the hub reads of a card."""
    known: dict[str, Any] = {key: origin[key] for key in ("base_model", "license") if key in origin}
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", **known}
    fields["tags"] = ["kv-cache-sharing", "skv-dist"]
    head = yaml.safe_dump(fields, sort_keys=False)
    return ["---", *head.splitlines(), "---"]


def _lineage(origin: dict[str, Any]) -> list[str]:
    """Whose weights the run began with, and under which licence."""
    if not origin:
        return []
    base = origin.get("base_model", origin.get("folder", "another model"))
    known = f"its licence, {origin['license']}," if "license" in origin else "its licence"
    return ["", f"The run began with the weights of `{base}`: {known} applies to these weights too."]


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


def _prompts(export: Export) -> list[str]:
    """What layers that trail save of the time to the first token; empty where none does."""
    num_layers, trailing = len(export.sources), len(RoutePlan(export.sources).trailing)
    if not trailing:
        return []
    under = "Under this map the" if export.adaptive else "The"
    last = (
        f"last {trailing} of {num_layers} layers all borrow and add" if trailing > 1 else "last layer borrows and adds"
    )
    return [
        f"{under} {last} nothing to the cache: transformers and MLX do not run a prompt through "
        f"{'them' if trailing > 1 else 'it'} but for its last token, which saves up to {trailing / num_layers:.0%} of "
        f"the time to the first token.",
        "",
    ]


def _comparison(config: dict[str, Any], findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return ["Not verified: `skv-convert verify CHECKPOINT FOLDER`."]
    measured = f"cache held in `{config['dtype']}` ({findings[0].how})"
    own = findings[0]
    cache = f"A token takes {own.cache_bytes:,.0f} bytes of cache"
    if own.ratio < 1:
        cache += f" instead of {own.unshared_bytes:,.0f}"
    return [f"{cache}. Compared with the checkpoint, both in float64; {measured}.", "", table(findings)]


def _losses(checkpoint: Path, step: int) -> list[str]:
    """The last evaluation of the run up to ``step``, from its ``metrics.jsonl``; empty without one."""
    file = checkpoint.parent.parent / files.METRICS
    losses: dict[str, float] = {}
    if file.is_file():
        for metrics in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            evaluated = losses_by_retention(metrics)
            if evaluated and metrics["step"] <= step:
                losses, last_step = evaluated, metrics["step"]
    if not losses:
        return []
    return [
        f"Validation loss (nats per token) at step {last_step}, by the part of layers that keep a cache:",
        "",
        *_row_table(list(losses), [f"{loss:.4f}" for loss in losses.values()]),
        "",
    ]


def _loading_code(name: str, config: dict[str, Any], export: Export, chats: bool) -> list[str]:
    is_ours = config["model_type"] == OUR_MODEL_TYPE
    custom = ", trust_remote_code=True" if is_ours else ""
    load = f'model = AutoModelForCausalLM.from_pretrained("{name}"{custom}'
    lines = ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{name}"{custom})', f"{load})"]
    if export.adaptive:
        means = "groups of two layers" if export.order is None else "the first half of kv_order keeps a cache"
        lines += [f"{load}, kv_retention=0.5)  # {means}"]
        lines += [f"{load}, kv_source_layers={list(export.sources)})"]
    lines += [""]
    if chats:
        lines += [
            'messages = [{"role": "user", "content": "What is a KV cache?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        lines += ['inputs = tokenizer("Once upon a time", add_special_tokens=False, return_tensors="pt")']
    lines += ["tokens = model.generate(**inputs, max_new_tokens=100)"]
    lines += ['print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))', "```"]
    if is_ours:
        lines += [
            "",
            "`trust_remote_code=True` lets transformers run `modeling_skv.py` of this folder. Without it the model is "
            "not loaded, and AutoTokenizer asks before it reads even the tokenizer.",
        ]
    return lines


def _not_carried(config: dict[str, Any]) -> str:
    """In what a model departs from the layers that every engine is given; empty where it does not."""
    names = [f"block.{name}" for name in config.get("block") or {}]
    rope = (config.get("rope_parameters") or {}).get("rope_type", "default")
    return ", ".join([*names, *([] if rope in ("default", "llama3") else [f"rope_type {rope}"])])


def _engines(name: str, config: dict[str, Any], block: str) -> list[str]:
    if config["model_type"] == OUR_MODEL_TYPE and (departs := _not_carried(config)):
        return [
            "- transformers 5.17 to 5.23: as above; layers that share hold no cache.",
            f"- vLLM, ONNX Runtime GenAI, MLX, llama.cpp: not supported, as what is written for them does not carry "
            f"{departs}.",
        ]
    if config["model_type"] == OUR_MODEL_TYPE:
        onnx = f"`skv-convert to-onnx {name} OUT`"
        if config["head_dim"] % 16:
            onnx = (
                f"not possible: it wants heads whose width is a multiple of 16, and these are {config['head_dim']} wide"
            )
        return [
            "- transformers 5.17 to 5.23: as above; layers that share hold no cache.",
            "- vLLM 0.32: install skv-dist's plugin from its source, `pip install '.[vllm]'` in a checkout (on no "
            f"package index), then `vllm serve {name} --trust-remote-code`. **Without this plugin vLLM runs the model "
            "and saves nothing**: its stock Transformers backend allocates a cache for every layer.",
            f"- ONNX Runtime GenAI: {onnx}.",
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
