"""``skv-convert``: checkpoints from and to Hugging Face folders, each export verified against where it came from."""

import argparse
import sys
from pathlib import Path

from skv_dist.commands.arguments import ArgumentParser
from skv_dist.commands.entry_point import entry_point
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError

from .blocks import Map
from .families import FAMILIES
from .searched import found_map, found_order


def _from_hf(arguments: argparse.Namespace) -> int:
    from skv_dist.files import new_folder

    from .brought import brought
    from .failed import check_or_keep, keep
    from .findings import table
    from .from_hf import MODEL_FILE, write_start
    from .progress import say
    from .reference import TEXT
    from .verify import verify_start

    with new_folder(arguments.out) as folder, brought(arguments.folder, arguments.out.parent) as (source, hub_name):
        start = write_start(source, folder, arguments.tokenizer, arguments.out, hub_name)
        for note in start.notes:
            say(f"{arguments.folder}: {note}")
        if not arguments.no_verify:
            say(f"{arguments.out}: comparing with {arguments.folder} in transformers")
            again = f"skv-convert from-hf {arguments.folder} OUT"
            try:
                findings = verify_start(source, folder, start.tokenizer.encode(TEXT)[None, :64])
            except (UserError, MemoryError) as error:
                raise keep(folder, arguments.out, f"it could not be compared: {error}", [], again) from error
            print(table(findings))
            check_or_keep(folder, arguments.out, findings, again)
    out = arguments.out.absolute()
    print(f"{arguments.out}: {start.num_parameters:,} parameters. To train from it, in the configuration of a run:")
    print(f"  base: {out / MODEL_FILE}\n  checkpoint: {{init_from: {out}}}")
    return 0


def _to_hf(arguments: argparse.Namespace) -> int:
    from skv_dist.checkpoint.frozen_model import config_of
    from skv_dist.checkpoint.kinds import checkpoint_at
    from skv_dist.files import new_folder

    from .card import write_card
    from .failed import check_or_keep, keep
    from .findings import Finding, table
    from .hf_config import OUR_MODEL_TYPE
    from .hf_folder import read_json
    from .progress import say
    from .reference import comparison_text
    from .to_hf import Export, check_expressible, write_folder
    from .verify import verify

    if arguments.shard_gb <= 0:
        raise UserError("--shard-gb must be greater than 0")
    checkpoint = checkpoint_at(arguments.checkpoint)
    if checkpoint != arguments.checkpoint:
        say(f"{arguments.checkpoint}: its newest checkpoint is {checkpoint}")
    run = config_of(checkpoint)
    sources, chosen = _asked_map(arguments, checkpoint, run)
    shard_bytes = int(arguments.shard_gb * 2**30)
    order = run.routing.order if arguments.from_search is None else found_order(arguments.from_search)
    export = Export(
        sources,
        arguments.adaptive,
        arguments.architecture,
        arguments.dtype,
        shard_bytes,
        chosen,
        None if order is None else tuple(order),
    )
    text = comparison_text(arguments.text, arguments.tokens)
    check_expressible(checkpoint, export)
    with new_folder(arguments.out) as folder:
        write_folder(checkpoint, folder, export, str(arguments.out))
        findings: list[Finding] = []
        if not arguments.no_verify:
            say(f"{arguments.out}: comparing with {checkpoint} in transformers")
            again = f"skv-convert verify {checkpoint} {{}}"
            try:
                findings = verify(
                    checkpoint, folder, "transformers", text=text, max_tokens=arguments.tokens, asked=sources
                )
            except (UserError, MemoryError) as error:
                raise keep(folder, arguments.out, f"it could not be compared: {error}", [], again) from error
            print(table(findings))
            check_or_keep(folder, arguments.out, findings, again)
        write_card(checkpoint, folder, arguments.out.name, export, findings)
    config = read_json(arguments.out / "config.json")
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{arguments.out}: {config['architectures'][0]}, {config['dtype']}, {size / 2**20:,.1f} MiB")
    if config["model_type"] == OUR_MODEL_TYPE:
        print(f"vLLM saves nothing without this project's plugin: see {arguments.out}/README.md")
    return 0


def _asked_map(arguments: argparse.Namespace, checkpoint: Path, run: RunConfig) -> tuple[Map, str]:
    """``kv_source_layers`` as one of the options says it, and for the card how it was chosen."""
    from skv_dist.routing import map_from_cached_layers, validate_sharing_map

    num_layers = run.model.num_layers
    if (arguments.from_search is None) != (arguments.budget is None):
        raise UserError("--from-search FILE and --budget R belong together: give both")
    if arguments.from_search is not None:
        return found_map(arguments.from_search, arguments.budget, checkpoint, num_layers)
    if arguments.retention is not None:
        of_order = "the first layers of the order of the run" if run.routing.order is not None else "uniform groups"
        return run.sharing_map(arguments.retention), f"{of_order} at {arguments.retention:g} of the cache"
    if arguments.cached_layers is not None:
        return map_from_cached_layers(num_layers, arguments.cached_layers, run.model.layer_kinds), "given by hand"
    if arguments.kv_source_layers is not None:
        sources = validate_sharing_map(arguments.kv_source_layers, num_layers, run.model.layer_kinds)
        return sources, "given by hand"
    return tuple(range(num_layers)), ""


def _to_peft(arguments: argparse.Namespace) -> int:
    from skv_dist.checkpoint.kinds import checkpoint_at
    from skv_dist.files import new_folder

    from .to_peft import to_peft

    with new_folder(arguments.out) as folder:
        count = to_peft(checkpoint_at(arguments.checkpoint), folder, arguments.dtype)
    print(f"{arguments.out}: adapters of {count:,} parameters, for peft's PeftModel.from_pretrained(base, folder)")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from skv_dist.checkpoint import folder as files
    from skv_dist.checkpoint.kinds import checkpoint_at

    from .findings import first_problem, table
    from .reference import comparison_text
    from .verify import verify

    checkpoint = checkpoint_at(arguments.checkpoint)
    files.verify(checkpoint)
    findings = verify(
        checkpoint,
        arguments.exported,
        arguments.engine,
        arguments.python,
        comparison_text(arguments.text, arguments.tokens),
        arguments.tokens,
    )
    print(table(findings))
    return 1 if first_problem(findings) else 0


def _to_onnx(arguments: argparse.Namespace) -> int:
    from skv_dist.files import new_folder

    from ..engines.export.onnx_genai import check_expressible, export_onnx
    from .failed import check_or_keep, keep
    from .findings import table
    from .kinds import refuse_other_kinds
    from .progress import say
    from .run_engine import require
    from .verify import verify_onnx

    refuse_other_kinds(arguments.exported)
    try:
        check_expressible(arguments.exported)
        if not arguments.no_verify:
            require(arguments.python, "onnxruntime_genai", "name its interpreter with --python, or give --no-verify")
        with new_folder(arguments.out) as folder:
            export_onnx(arguments.exported, folder, arguments.dtype)
            if not arguments.no_verify:
                say(f"{arguments.out}: comparing with {arguments.exported}, in ONNX Runtime GenAI and transformers")
                again = f"skv-convert to-onnx {arguments.exported} OUT --dtype {arguments.dtype}"
                try:
                    findings = verify_onnx(arguments.exported, folder, arguments.python, arguments.dtype)
                except (UserError, MemoryError) as error:
                    raise keep(folder, arguments.out, f"it could not be compared: {error}", [], again) from error
                print(table(findings))
                check_or_keep(folder, arguments.out, findings, again)
    except ValueError as error:
        raise UserError(str(error)) from error
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{arguments.out}: for ONNX Runtime GenAI, {arguments.dtype}, {size / 2**20:,.1f} MiB")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="skv-convert", description=__doc__, epilog="example: skv-convert to-hf RUN out --retention 0.5"
    )
    actions = parser.add_subparsers(required=True)

    start = actions.add_parser(
        "from-hf",
        help="folder of a known family (docs/families.md) -> checkpoint for checkpoint.init_from",
        epilog="example: skv-convert from-hf Qwen3-0.6B weights/qwen3; a configuration then begins with "
        "base: weights/qwen3/model.yaml",
    )
    start.set_defaults(action=_from_hf)
    start.add_argument(
        "folder",
        help="holds config.json, safetensors and a tokenizer; or the name of a model on the hub, such as "
        "Qwen/Qwen3-0.6B, or a file of GGUF (pip install 'skv-dist[gguf]')",
    )
    start.add_argument("out", type=Path, help="folder to create")
    start.add_argument("--tokenizer", metavar="NAME", help="for data.tokenizer (default: the folder's own)")
    start.add_argument("--no-verify", action="store_true", help="do not compare with the folder, in transformers")

    export = actions.add_parser(
        "to-hf",
        help="checkpoint of any layout -> folder for inference engines",
        epilog="example: skv-convert to-hf RUN out --from-search layers.json --budget 0.5",
    )
    export.set_defaults(action=_to_hf)
    export.add_argument(
        "checkpoint", type=Path, help="a folder such as RUN/checkpoints/step_00000100; RUN means its newest"
    )
    export.add_argument("out", type=Path, help="folder to create")
    sharing = export.add_mutually_exclusive_group()
    sharing.add_argument("--full", action="store_true", help="every layer keeps a cache: stock code (default)")
    sharing.add_argument(
        "--retention", type=float, metavar="R", help="uniform groups of round(1/R) layers, or by the run's order"
    )
    sharing.add_argument("--from-search", type=Path, metavar="FILE", help="what skv-eval search found, with --budget")
    sharing.add_argument("--cached-layers", type=int, nargs="+", metavar="L", help="these layers keep a cache")
    sharing.add_argument("--kv-source-layers", type=int, nargs="+", metavar="L", help="the source of each layer")
    export.add_argument("--budget", type=float, metavar="R", help="which of the sets in --from-search")
    export.add_argument("--adaptive", action="store_true", help="keep all K/V weights: the map is chosen at load")
    export.add_argument("--architecture", choices=tuple(FAMILIES), help="of a full export")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the run's precision")
    export.add_argument("--shard-gb", type=float, default=2.0, help="largest file of weights (default: 2)")
    export.add_argument("--no-verify", action="store_true", help="do not compare with the checkpoint")
    _add_text(export)

    adapters = actions.add_parser(
        "to-peft",
        help="adapters of a checkpoint (lora) -> folder for peft",
        epilog="example: skv-convert to-peft RUN out",
    )
    adapters.set_defaults(action=_to_peft)
    adapters.add_argument("checkpoint", type=Path, help="a folder such as RUN/checkpoints/step_00000100, or RUN")
    adapters.add_argument("out", type=Path, help="folder to create")
    adapters.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32")

    check = actions.add_parser(
        "verify",
        help="compare an exported folder with its checkpoint, in an engine",
        epilog="example: skv-convert verify RUN out --engine vllm --python vllm/bin/python",
    )
    check.set_defaults(action=_verify)
    check.add_argument("checkpoint", type=Path)
    check.add_argument("exported", type=Path)
    check.add_argument("--engine", choices=("transformers", "onnx", "mlx", "vllm"), default="transformers")
    check.add_argument("--python", default=sys.executable, help="interpreter that has the engine (default: this one)")
    _add_text(check)

    onnx = actions.add_parser(
        "to-onnx",
        help="exported folder -> folder for ONNX Runtime GenAI",
        epilog="example: skv-convert to-onnx out out-onnx",
    )
    onnx.set_defaults(action=_to_onnx)
    onnx.add_argument("exported", type=Path)
    onnx.add_argument("out", type=Path, help="folder to create")
    onnx.add_argument(
        "--dtype",
        choices=("float32", "float16", "int4"),
        default="float32",
        help="float16: for GPUs; int4: projections in four bits, embedding and head in eight (default: float32)",
    )
    onnx.add_argument("--no-verify", action="store_true", help="do not compare with the exported folder")
    onnx.add_argument("--python", default=sys.executable, help="interpreter that has onnxruntime-genai")
    return parser


def _add_text(parser: ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, help="file whose beginning is compared on (default: a few sentences)")
    parser.add_argument("--tokens", type=int, default=64, help="length of the text compared on (default: 64)")


@entry_point
def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    return int(arguments.action(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
