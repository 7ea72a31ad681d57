"""``skv-checkpoint``: look at a run's checkpoints, take the weights out, remove old ones. One process, no GPU."""

import argparse
from pathlib import Path

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.kinds import checkpoint_at
from skv_dist.commands.arguments import ArgumentParser
from skv_dist.commands.entry_point import entry_point
from skv_dist.errors import UserError


def _inspect(arguments: argparse.Namespace) -> None:
    from .summary import summary, tensor_list

    arguments.checkpoint = checkpoint_at(arguments.checkpoint)
    files.verify(arguments.checkpoint)
    for name, value in summary(arguments.checkpoint).items():
        print(f"{name + ':':<12}{value}")
    if arguments.tensors:
        print("\n".join(tensor_list(arguments.checkpoint)))


def _export(arguments: argparse.Namespace) -> None:
    from .export import export_weights

    arguments.checkpoint = checkpoint_at(arguments.checkpoint)
    files.verify(arguments.checkpoint)
    num_tensors, num_files = export_weights(arguments.checkpoint, arguments.out)
    print(f"{arguments.out}: {num_tensors} tensors in {num_files} file{'s' if num_files > 1 else ''}")


def _prune(arguments: argparse.Namespace) -> None:
    if arguments.keep_last < 1 or (arguments.keep_every or 1) < 1:
        raise UserError("--keep-last and --keep-every must be at least 1")
    root = arguments.run / files.CHECKPOINTS
    if not root.is_dir():
        raise UserError(f"{arguments.run} holds no checkpoints")
    for folder in files.prune(root, arguments.keep_last, arguments.keep_every):
        print(f"deleted {folder}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="skv-checkpoint", description=__doc__, epilog="example: skv-checkpoint inspect RUN")
    actions = parser.add_subparsers(required=True)

    inspect = actions.add_parser(
        "inspect",
        help="step, layout, size and tensors of a checkpoint",
        epilog="example: skv-checkpoint inspect RUN --tensors",
    )
    inspect.set_defaults(action=_inspect)
    inspect.add_argument(
        "checkpoint", type=Path, help="a folder such as RUN/checkpoints/step_00000100; RUN means its newest"
    )
    inspect.add_argument("--tensors", action="store_true", help="list every tensor with its shape")

    export = actions.add_parser(
        "export",
        help="write the fp32 weights to safetensors, under global names",
        epilog="example: skv-checkpoint export RUN weights",
    )
    export.set_defaults(action=_export)
    export.add_argument("checkpoint", type=Path)
    export.add_argument("out", type=Path, help="folder to create")

    prune = actions.add_parser(
        "prune",
        help="delete old checkpoints of a run",
        epilog="example: skv-checkpoint prune RUN --keep-last 3 --keep-every 1000",
    )
    prune.set_defaults(action=_prune)
    prune.add_argument("run", type=Path, help="train.output_dir")
    prune.add_argument("--keep-last", type=int, required=True, metavar="N")
    prune.add_argument("--keep-every", type=int, metavar="M", help="also keep those whose step M divides")
    return parser


@entry_point
def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    arguments.action(arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
