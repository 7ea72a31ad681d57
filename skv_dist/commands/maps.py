"""Arguments that commands on a checkpoint share: which checkpoint, in which layout, under which sharing maps."""

import argparse
import json
from pathlib import Path
from typing import Any

from skv_dist.config.data import DataConfig
from skv_dist.config.run import RunConfig, derive
from skv_dist.config.words import in_yaml
from skv_dist.errors import UserError
from skv_dist.files import replace_text
from skv_dist.routing import RoutePlan, map_from_cached_layers


def describe_overrides(parser: argparse.ArgumentParser) -> None:
    """Say what `parse` does with arguments that no option takes."""
    parser.description = (
        f"{parser.description} Arguments of the form section.key=value, such as parallel.tensor=2, change the "
        "checkpoint's configuration; it is laid out over one process unless they say otherwise."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that measures a checkpoint under maps that are given."""
    describe_overrides(parser)
    parser.add_argument("--retention", type=float, nargs="+", metavar="R", help="default: eval.retention")
    parser.add_argument(
        "--cached-layers",
        type=int,
        nargs="+",
        action="append",
        default=[],
        metavar="L",
        help="also measure the map in which only these layers keep a cache (may be given several times)",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Of commands that measure losses: on which text."""
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="measure on these files, folders or prepared sets instead of on what the run held out, whose files are "
        "not needed then; fields are named as in the run's first source of the same format",
    )


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The arguments, with ``overrides``: those of the form section.key=value, wherever they stand.

    argparse would take one behind ``--retention 1 0.5`` for a retention.
    """
    overrides = [argument for argument in argv if _is_override(argument)]
    arguments = parser.parse_args([argument for argument in argv if argument not in overrides])
    arguments.overrides = overrides
    return arguments


def _is_override(argument: str) -> bool:
    key, equals, _ = argument.partition("=")
    section, dot, _ = key.partition(".")
    return bool(equals and dot) and section in RunConfig.model_fields


def configuration(arguments: argparse.Namespace, asked: list[str]) -> RunConfig:
    """The checkpoint's configuration with what the command line asks for, checked against the number of processes.

    Args:
        asked: overrides that come before those of the command line.

    Raises:
        UserError: it cannot run.
    """
    from skv_dist.checkpoint.frozen_model import config_of
    from skv_dist.parallel.processes import launcher

    if getattr(arguments, "retention", None) is not None:
        asked = [f"eval.retention={json.dumps(arguments.retention)}", *asked]
    if getattr(arguments, "data", None) is not None:
        asked = [*_data_overrides(arguments.data, config_of(arguments.checkpoint).data), *asked]
    run = config_of(arguments.checkpoint, [*asked, *arguments.overrides])
    derive(run, launcher.world_size())
    return run


def _data_overrides(paths: list[str], trained: DataConfig) -> list[str]:
    """Keys by which `paths` are all that is read. Fields are named as in the run's first source of the same format."""
    from skv_dist.data.local_files import format_of_all
    from skv_dist.data.megatron_set import SUFFIXES, files_of
    from skv_dist.data.token_set import META

    sources = []
    for path in paths:
        place = Path(path).expanduser()
        is_prefix = not place.exists() and all(file.is_file() for file in files_of(place))
        if not (place.exists() or is_prefix):
            raise UserError(f"--data {path}: there is no such file or folder")
        if (place / META).is_file():
            kind = "prepared"
        elif is_prefix or place.suffix in SUFFIXES:
            kind = "megatron"
        else:
            kind = format_of_all(path, [], "name the files in place of their folder")
        like = next((source for source in trained.sources if source.format == kind), None)
        fields = (
            like.model_dump(include={"text_field", "prompt_field", "response_field", "messages_field"}) if like else {}
        )
        sources.append({"path": path, "format": kind, **fields})
    both = in_yaml(sources)
    return [f"data.sources={both}", f"data.validation_sources={both}", "data.streaming=false"]


def plans(arguments: argparse.Namespace, run: RunConfig) -> dict[str, RoutePlan]:
    """The sharing maps to measure, by the name of their loss."""
    from skv_dist.evaluation.sweep import retention_plans

    named = retention_plans(run)
    for layers in arguments.cached_layers:
        table = map_from_cached_layers(run.model.num_layers, layers, run.model.layer_kinds)
        named[f"loss@layers {','.join(map(str, sorted(set(layers))))}"] = RoutePlan(table)
    return named


def write_json(file: Path, content: Any) -> None:
    """An earlier file stays until the new one is whole.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(content, indent=2) + "\n"
    try:
        if file.exists() and not file.is_file():  # a pipe or a terminal
            file.write_text(text)
        else:
            replace_text(file.resolve(), text)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
