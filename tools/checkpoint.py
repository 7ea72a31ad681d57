"""``skv-checkpoint``: look at a run's checkpoints, take the weights out, remove old ones. One process, no GPU."""

import argparse
import math
import shutil
from pathlib import Path

from skv_dist.checkpoint import folder as files
from skv_dist.errors import UserError, command
from skv_dist.files import new_folder

_FILE_BYTES = 4 * 2**30


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skv-checkpoint", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    inspect = actions.add_parser("inspect", help="step, layout, size and tensors of a checkpoint")
    inspect.add_argument("checkpoint", type=Path, help="a folder such as RUN/checkpoints/step_00000100")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor with its shape")
    export = actions.add_parser("export", help="write the fp32 weights to safetensors, under global names")
    export.add_argument("checkpoint", type=Path)
    export.add_argument("out", type=Path, help="folder to create")
    prune = actions.add_parser("prune", help="delete old checkpoints of a run")
    prune.add_argument("run", type=Path, help="train.output_dir")
    prune.add_argument("--keep-last", type=int, required=True, metavar="N")
    prune.add_argument("--keep-every", type=int, metavar="M", help="also keep those whose step M divides")
    return parser


def _inspect(folder: Path, with_tensors: bool) -> None:
    from skv_dist.checkpoint.save import tensor_shapes

    files.verify(folder)
    state, shapes = files.read_state(folder), tensor_shapes(folder)
    weights = {name.removeprefix("model."): shape for name, shape in shapes.items() if name.startswith("model.")}
    size = sum(path.stat().st_size for path in folder.iterdir())
    lines = {
        "checkpoint": f"{folder} (whole: sizes and SHA-256 agree with its manifest)",
        "step": f"{state['step']:,}, {state['samples']:,} samples, {state['updates']:,} updates",
        "written by": f"{state['software']}; {state['world_size']} processes, "
        + ", ".join(f"{key} {value}" for key, value in state["layout"].items() if value not in (None, False, 1)),
        "model": f"{sum(math.prod(shape) for shape in weights.values()):,} parameters in {len(weights)} tensors",
        "on disk": f"{size / 2**20:,.1f} MiB in {len(list(folder.iterdir()))} files",
    }
    for name, value in lines.items():
        print(f"{name + ':':<12}{value}")
    if with_tensors:
        for name, shape in sorted(shapes.items()):
            print(f"{name}  {list(shape)}")


def _export(folder: Path, out: Path) -> None:
    from skv_dist.checkpoint.save import read_tensors, tensor_shapes

    from .weights import write_weights

    files.verify(folder)
    shapes = {name: shape for name, shape in sorted(tensor_shapes(folder).items()) if name.startswith("model.")}
    tensors = ((name.removeprefix("model."), read_tensors(folder, [name])[name]) for name in shapes)
    names = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    with new_folder(out) as aside:
        written = write_weights(aside, names, "float32", _FILE_BYTES, tensors)
        shutil.copy(folder / files.CONFIG, aside / files.CONFIG)
    print(f"{out}: {len(names)} tensors in {written} file{'s' if written > 1 else ''}")


@command
def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.action == "inspect":
        _inspect(arguments.checkpoint, arguments.tensors)
    elif arguments.action == "export":
        _export(arguments.checkpoint, arguments.out)
    else:
        if arguments.keep_last < 1 or (arguments.keep_every or 1) < 1:
            raise UserError("--keep-last and --keep-every must be at least 1")
        root = arguments.run / "checkpoints"
        if not root.is_dir():
            raise UserError(f"{arguments.run} holds no checkpoints")
        for folder in files.prune(root, arguments.keep_last, arguments.keep_every):
            print(f"deleted {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
