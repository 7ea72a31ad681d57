"""``skv-data``: prepare token sets ahead of a run."""

from pathlib import Path

from skv_dist.commands.arguments import ArgumentParser
from skv_dist.commands.entry_point import entry_point
from skv_dist.config.data import SourceConfig
from skv_dist.errors import UserError


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="skv-data", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("prepare", help="tokenize text, JSONL, Parquet or a hub dataset")
    action.add_argument("paths", nargs="+", help="files, folders or globs (** recurses), or hub names")
    action.add_argument("--out", required=True, type=Path, help="folder to create")
    action.add_argument(
        "--format", choices=["text", "jsonl", "parquet", "hub"], help="default: by the suffixes of the files"
    )
    action.add_argument("--tokenizer", default="byte", help="'byte', a folder or a hub name (default: byte)")
    action.add_argument("--text-field", default="text", help="field that holds the text (default: text)")
    action.add_argument("--name", help="configuration of a hub dataset")
    action.add_argument("--split", default="train", help="split of a hub dataset (default: train)")
    action.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave out matching files")
    action.add_argument(
        "--max-skipped",
        type=float,
        default=0.1,
        metavar="PART",
        help="largest part of a source's documents that may hold no text; ten always may (default: 0.1)",
    )
    action.add_argument("--workers", type=int, default=1, help="tokenizing processes (default: 1)")
    return parser


@entry_point
def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    from skv_dist.data.local_files import format_of_all
    from skv_dist.data.token_set import PreparedSet
    from skv_dist.data.tokenize import prepare
    from skv_dist.data.tokenizer import load_tokenizer

    if arguments.workers < 1:
        raise UserError(f"--workers must be at least 1, got {arguments.workers}")
    if not 0 <= arguments.max_skipped <= 1:
        raise UserError(f"--max-skipped must be between 0 and 1, got {arguments.max_skipped}")
    sources = [
        SourceConfig(
            path=path,
            format=arguments.format or format_of_all(path, arguments.exclude),
            name=arguments.name,
            split=arguments.split,
            text_field=arguments.text_field,
            exclude=arguments.exclude,
        )
        for path in arguments.paths
    ]
    tokenizer = load_tokenizer(arguments.tokenizer)
    prepare(sources, tokenizer, arguments.out, workers=arguments.workers, max_skipped=arguments.max_skipped)
    made = PreparedSet(arguments.out, tokenizer)
    print(f"{arguments.out}: {made.num_documents:,} documents, {len(made.tokens):,} tokens ({tokenizer.name})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
