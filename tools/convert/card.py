"""The README of an exported folder."""

import json
from pathlib import Path
from typing import Any

from skv_dist import __version__
from skv_dist.checkpoint import folder as files

from .to_hf import Export
from .verify import Finding, table


def measured_losses(checkpoint: Path) -> dict[str, float]:
    """``loss@R`` of the run's last evaluation up to this checkpoint, from its ``metrics.jsonl``; empty without one."""
    file, step = checkpoint.parent.parent / "metrics.jsonl", int(files.read_state(checkpoint)["step"])
    found: dict[str, float] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            metrics: dict[str, Any] = json.loads(line)
            losses = {k.removeprefix("eval/"): v for k, v in metrics.items() if k.startswith("eval/loss@")}
            if losses and metrics["step"] <= step:
                found = {**losses, "step": metrics["step"]}
    return found


def model_card(checkpoint: Path, name: str, config: dict[str, Any], export: Export, findings: list[Finding]) -> str:
    """Markdown.

    Args:
        name: of the exported folder.
        config: its ``config.json``.
    """
    layers, owners = len(export.sources), sorted(set(export.sources))
    shares = not export.is_stock
    own_code = config["model_type"] == "skv"
    text = ["---", "library_name: transformers", "tags: [kv-cache-sharing, skv-dist]", "---", "", f"# {name}", ""]
    if not shares:
        text.append(f"Every layer keeps its own KV cache: stock `{config['architectures'][0]}`, no custom code.")
    elif export.adaptive:
        text.append(
            f"The KV cache of this model can be cut in depth when it is loaded: any of its {layers} layers may read "
            "the keys and values of an earlier one. Unless told otherwise, layers "
            f"{owners} keep a cache (`kv_source_layers` in config.json)."
        )
    else:
        text.append(f"{len(owners)} of {layers} layers keep a KV cache; the others read that of an earlier layer.")
    text += [
        "",
        f"Written by skv-dist {__version__} from step {files.read_state(checkpoint)['step']} of a run. "
        "Method: stochastic KV routing, [arXiv 2604.22782](https://arxiv.org/abs/2604.22782).",
        "",
    ]
    if shares:
        text += ["| layer | " + " | ".join(map(str, range(layers))) + " |", "|---" * (layers + 1) + "|"]
        text += ["| reads the K/V of | " + " | ".join(map(str, export.sources)) + " |", ""]
    text += ["## Measured", ""]
    if findings:
        text += [
            f"Against the checkpoint, both in float32; cache held in `{config['dtype']}` ({findings[0].how}).",
            "",
            table(findings),
            "",
        ]
    else:
        text += ["Not verified: `skv-convert verify CHECKPOINT FOLDER`.", ""]
    losses = measured_losses(checkpoint)
    if losses:
        step = int(losses.pop("step"))
        text += [f"Validation loss (nats per token) at step {step}, by the part of layers that keep a cache:", ""]
        text += ["| " + " | ".join(k.removeprefix("loss@") for k in losses) + " |", "|---" * len(losses) + "|"]
        text += ["| " + " | ".join(f"{value:.4f}" for value in losses.values()) + " |", ""]
    text += ["## Loading", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    custom = ", trust_remote_code=True" if own_code else ""
    text += [f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
    text += [f'model = AutoModelForCausalLM.from_pretrained("{name}"{custom})']
    if export.adaptive:
        text += [
            f'model = AutoModelForCausalLM.from_pretrained("{name}"{custom}, kv_retention=0.5)  # groups of two layers',
            f'model = AutoModelForCausalLM.from_pretrained("{name}"{custom}, kv_source_layers={list(export.sources)})',
        ]
    text += ["```", ""]
    if own_code:
        text += [
            "- transformers 5.17 to 5.23: as above; layers that share hold no cache.",
            f"- vLLM: `pip install 'skv-dist[vllm]'`, then `vllm serve {name} --trust-remote-code`. **Without this "
            "plugin vLLM runs the model and saves nothing**: its stock Transformers backend allocates a cache for "
            "every layer.",
            f"- ONNX Runtime GenAI: `skv-convert to-onnx {name} OUT`.",
            f'- MLX: `mlx_lm.load("{name}", trust_remote_code=True)` runs `mlx_skv.py` of this folder.',
            "- llama.cpp: cannot express the map; not supported (models of Gemma 4's block are).",
        ]
    else:
        text += ["Any engine that knows the stock architecture loads it."]
    if config["model_type"] == "gemma4_text":
        command = "python -m skv_tools.engines.export.to_gguf LLAMA_CPP FOLDER OUT.gguf"
        text += [f"llama.cpp: `{command}` runs its converter."]
    return "\n".join(text) + "\n"
