"""``skv-data``: prepare sets of tokens, look at what a model learns from a source, write Megatron's format."""

import argparse
import sys
from pathlib import Path

from pydantic import ValidationError

from skv_dist.commands.arguments import ArgumentParser
from skv_dist.commands.entry_point import entry_point
from skv_dist.config.data import SourceConfig
from skv_dist.errors import UserError


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="skv-data",
        description=__doc__,
        epilog="example: skv-data prepare 'corpus/**/*.jsonl' --tokenizer MODEL --out data/corpus",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    prepare = actions.add_parser(
        "prepare",
        help="tokenize text, JSONL, Parquet or a hub dataset",
        description="Tokenize sources once, into a folder that runs map into memory.",
        epilog="example: skv-data prepare chats.jsonl --messages-field messages --tokenizer MODEL --out data/chats",
    )
    _add_source_arguments(prepare)
    prepare.add_argument("--out", required=True, type=Path, help="folder to create")
    prepare.add_argument(
        "--max-skipped",
        type=float,
        default=0.1,
        metavar="PART",
        help="largest part of a source's documents that may hold no text; ten always may (default: 0.1)",
    )
    prepare.add_argument("--workers", type=int, default=1, help="tokenizing processes (default: 1)")
    show = actions.add_parser(
        "show",
        help="print documents as a model sees them, what counts in the loss in green",
        description="Print the first documents of a source as a model sees them. What counts in the loss is green.",
        epilog="example: skv-data show questions.jsonl --prompt-field '{question} ' --response-field answer -n 3",
    )
    _add_source_arguments(show)
    show.add_argument("-n", "--number", type=int, default=3, help="documents to print (default: 3)")
    show.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="default: on a terminal")
    export = actions.add_parser(
        "export",
        help="write a prepared set as Megatron's .bin and .idx",
        description="Write a prepared set in Megatron's format, which format: megatron reads too.",
        epilog="example: skv-data export data/corpus data/corpus_text_document",
    )
    export.add_argument("folder", type=Path, help="what skv-data prepare made")
    export.add_argument("prefix", type=Path, help="what the names of the two files begin with, or one of them")
    return parser


def _add_source_arguments(action: argparse.ArgumentParser) -> None:
    action.add_argument("paths", nargs="+", help="files, folders or globs (** recurses), or hub names")
    action.add_argument(
        "--format", choices=["text", "jsonl", "parquet", "hub"], help="default: by the suffixes of the files"
    )
    action.add_argument("--tokenizer", default="byte", help="'byte', a folder or a hub name (default: byte)")
    action.add_argument("--text-field", default="text", help="field that holds the text (default: text)")
    action.add_argument("--prompt-field", help="field, or text with {fields}, that makes a prompt of each row")
    action.add_argument("--response-field", help="field, or text with {fields}, that holds its answer")
    action.add_argument("--messages-field", help="field that holds the messages of a chat")
    action.add_argument("--name", help="configuration of a hub dataset")
    action.add_argument("--split", default="train", help="split of a hub dataset (default: train)")
    action.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave out matching files")


@entry_point
def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.action == "export":
        from skv_dist.data.megatron_set import export, prefix_of

        prefix = prefix_of(str(arguments.prefix))
        made = export(arguments.folder, prefix)
        print(f"{prefix}.bin, .idx: {made.num_documents:,} documents, {len(made.tokens):,} tokens")
        return 0
    sources = _sources(arguments)
    from skv_dist.data.tokenizer import load_tokenizer

    if arguments.action == "show":
        if arguments.number < 1:
            raise UserError(f"--number must be at least 1, got {arguments.number}")
        from skv_dist.data.show import show

        colored = arguments.color == "always" or (arguments.color == "auto" and sys.stdout.isatty())
        show(sources, load_tokenizer(arguments.tokenizer), arguments.number, colored=colored)
        return 0
    if arguments.workers < 1:
        raise UserError(f"--workers must be at least 1, got {arguments.workers}")
    if not 0 <= arguments.max_skipped <= 1:
        raise UserError(f"--max-skipped must be between 0 and 1, got {arguments.max_skipped}")
    from skv_dist.data.token_set import PreparedSet
    from skv_dist.data.tokenize import prepare

    tokenizer = load_tokenizer(arguments.tokenizer)
    prepare(sources, tokenizer, arguments.out, workers=arguments.workers, max_skipped=arguments.max_skipped)
    made = PreparedSet(arguments.out, tokenizer)
    print(f"{arguments.out}: {made.num_documents:,} documents, {len(made.tokens):,} tokens ({tokenizer.name})")
    return 0


def _sources(arguments: argparse.Namespace) -> list[SourceConfig]:
    from skv_dist.data.local_files import format_of_all

    try:
        return [
            SourceConfig(
                path=path,
                format=arguments.format or format_of_all(path, arguments.exclude),
                name=arguments.name,
                split=arguments.split,
                text_field=arguments.text_field,
                prompt_field=arguments.prompt_field,
                response_field=arguments.response_field,
                messages_field=arguments.messages_field,
                exclude=arguments.exclude,
            )
            for path in arguments.paths
        ]
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


if __name__ == "__main__":
    raise SystemExit(main())
