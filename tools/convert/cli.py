"""``skv-convert``: checkpoints from and to Hugging Face folders, each export verified against where it came from."""

import argparse
import json
import sys
from pathlib import Path

from skv_dist.errors import UserError, command


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, help="file whose beginning is compared on (default: a few sentences)")
    parser.add_argument("--tokens", type=int, default=64, help="length of the text compared on (default: 64)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skv-convert", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)

    start = actions.add_parser("from-hf", help="Llama, Qwen3 or Mistral folder -> checkpoint for checkpoint.init_from")
    start.add_argument("folder", type=Path, help="holds config.json, safetensors and a tokenizer")
    start.add_argument("out", type=Path, help="folder to create")
    start.add_argument("--tokenizer", metavar="NAME", help="for data.tokenizer (default: the folder's own)")

    export = actions.add_parser("to-hf", help="checkpoint of any layout -> folder for inference engines")
    export.add_argument("checkpoint", type=Path, help="a folder such as RUN/checkpoints/step_00000100")
    export.add_argument("out", type=Path, help="folder to create")
    sharing = export.add_mutually_exclusive_group()
    sharing.add_argument("--full", action="store_true", help="every layer keeps a cache: stock code (default)")
    sharing.add_argument("--retention", type=float, metavar="R", help="uniform groups of round(1/R) layers")
    sharing.add_argument("--cached-layers", type=int, nargs="+", metavar="L", help="these layers keep a cache")
    sharing.add_argument("--kv-source-layers", type=int, nargs="+", metavar="L", help="the source of each layer")
    export.add_argument("--adaptive", action="store_true", help="keep all K/V weights: the map is chosen at load")
    export.add_argument("--architecture", choices=("llama", "qwen3", "mistral"), help="of a full export")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the run's precision")
    export.add_argument("--shard-gb", type=float, default=2.0, help="largest file of weights (default: 2)")
    export.add_argument("--no-verify", action="store_true", help="do not compare with the checkpoint")
    _add_text(export)

    check = actions.add_parser("verify", help="compare an exported folder with its checkpoint, in an engine")
    check.add_argument("checkpoint", type=Path)
    check.add_argument("exported", type=Path)
    check.add_argument("--engine", choices=("transformers", "onnx", "mlx", "vllm"), default="transformers")
    check.add_argument("--python", default=sys.executable, help="interpreter that has the engine (default: this one)")
    _add_text(check)

    onnx = actions.add_parser("to-onnx", help="exported folder -> folder for ONNX Runtime GenAI")
    onnx.add_argument("exported", type=Path)
    onnx.add_argument("out", type=Path, help="folder to create")
    return parser


def _export(arguments: argparse.Namespace) -> None:
    from skv_dist.checkpoint.frozen_model import config_of
    from skv_dist.files import new_folder
    from skv_dist.routing import map_from_cached_layers, map_from_retention, validate_sharing_map

    from .card import model_card
    from .to_hf import Export, write_folder
    from .verify import table, verify

    layers = config_of(arguments.checkpoint).model.num_layers
    if arguments.retention is not None:
        sources = map_from_retention(layers, arguments.retention)
    elif arguments.cached_layers is not None:
        sources = map_from_cached_layers(layers, arguments.cached_layers)
    elif arguments.kv_source_layers is not None:
        sources = validate_sharing_map(arguments.kv_source_layers, layers)
    else:
        sources = tuple(range(layers))
    if arguments.shard_gb <= 0:
        raise UserError("--shard-gb must be greater than 0")
    shard_bytes = int(arguments.shard_gb * 2**30)
    export = Export(sources, arguments.adaptive, arguments.architecture, arguments.dtype, shard_bytes)
    if arguments.architecture is not None and not export.is_stock:
        raise UserError("--architecture is for a full export: a model that shares K/V runs code of its own")
    text = _text(arguments)
    with new_folder(arguments.out) as aside:
        write_folder(arguments.checkpoint, aside, export)
        findings = []
        if not arguments.no_verify:
            findings = verify(arguments.checkpoint, aside, "transformers", text=text, most_tokens=arguments.tokens)
            print(table(findings))
            problem = next((finding.problem() for finding in findings if finding.problem()), None)
            if problem is not None:
                raise UserError(f"the export is not the checkpoint and was removed: {problem}")
        config = json.loads((aside / "config.json").read_text())
        card = model_card(arguments.checkpoint, arguments.out.name, config, export, findings)
        (aside / "README.md").write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{arguments.out}: {config['architectures'][0]}, {config['dtype']}, {size / 2**20:,.1f} MiB")
    if config["model_type"] == "skv":
        print(f"vLLM saves nothing without its plugin, pip install 'skv-dist[vllm]': see {arguments.out}/README.md")


def _text(arguments: argparse.Namespace) -> str:
    from .verify import TEXT

    if arguments.tokens < 2:
        raise UserError("--tokens must be at least 2")
    if arguments.text is None:
        return TEXT
    try:
        with arguments.text.open(encoding="utf-8", errors="replace") as file:
            return str(file.read(64 * arguments.tokens))
    except OSError as error:
        raise UserError(f"cannot read {arguments.text}: {error.strerror}") from error


@command
def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.action == "from-hf":
        from .from_hf import MODEL_FILE, from_hf

        count = from_hf(arguments.folder, arguments.out, arguments.tokenizer)
        print(f"{arguments.out}: {count:,} parameters. To train from it, in the configuration of a run:")
        print(f"  base: {arguments.out.resolve() / MODEL_FILE}\n  checkpoint: {{init_from: {arguments.out.resolve()}}}")
    elif arguments.action == "to-hf":
        _export(arguments)
    elif arguments.action == "to-onnx":
        from skv_dist.files import new_folder

        from ..engines.export.onnx_genai import export_onnx

        try:
            with new_folder(arguments.out) as aside:
                export_onnx(arguments.exported, aside)
        except ValueError as error:
            raise UserError(str(error)) from error
        print(f"{arguments.out}: written; to compare: skv-convert verify CHECKPOINT {arguments.exported} --engine onnx")
    else:
        from .verify import table, verify

        findings = verify(
            arguments.checkpoint,
            arguments.exported,
            arguments.engine,
            arguments.python,
            _text(arguments),
            arguments.tokens,
        )
        print(table(findings))
        return 1 if any(finding.problem() for finding in findings) else 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
