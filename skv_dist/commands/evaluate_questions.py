"""``skv-eval questions``: answers to the questions of a file, scored at several cache sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from skv_dist.commands import maps
from skv_dist.commands.arguments import ArgumentParser
from skv_dist.config.train import QuestionsConfig
from skv_dist.errors import UserError

if TYPE_CHECKING:  # torch is imported once the configuration is known to be good
    from skv_dist.evaluation.questions import Score


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="skv-eval questions",
        description=__doc__,
        epilog="example: skv-eval questions RUN/checkpoints/step_00000100 questions.jsonl --prompt-field "
        "'{context}\\nQuestion: {question}\\nAnswer:' --answers-field answers --retention 1 0.5 0.25",
    )
    parser.add_argument("checkpoint", type=Path, help="a folder such as RUN/checkpoints/step_00000100; RUN: its newest")
    parser.add_argument("file", help="JSONL or Parquet, one question a row")
    maps.add_arguments(parser)
    parser.add_argument(
        "--prompt-field", help="field, or text with {fields} (default: prompt_field of the checkpoint's first source)"
    )
    parser.add_argument(
        "--answers-field", help="field with the right answer, or a list of them (default: that of response_field)"
    )
    parser.add_argument("--chat", action="store_true", help="give the prompt as a user's message, by the chat template")
    parser.add_argument("--number", type=int, help="take the first so many questions (default: all)")
    parser.add_argument("--new-tokens", type=int, default=32, help="largest length of an answer (default: 32)")
    parser.add_argument("--batch-size", type=int, default=16, help="questions answered together (default: 16)")
    return parser


def evaluate_questions(argv: list[str]) -> int:
    """The command behind its name.

    Raises:
        UserError: the file, the checkpoint or an argument is not what it should be.
    """
    from skv_dist.checkpoint.kinds import checkpoint_at

    arguments = maps.parse(_parser(), argv)
    arguments.checkpoint = checkpoint_at(arguments.checkpoint)
    for name in ("number", "new_tokens", "batch_size"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if not arguments.file:
        raise UserError("the name of the file of questions is empty")
    run = maps.configuration(arguments, [])

    from skv_dist.checkpoint.frozen_model import frozen_model
    from skv_dist.checkpoint.travelling import end_tokens, origin_of, tokenizer_of
    from skv_dist.evaluation.questions import answer_questions, read_questions
    from skv_dist.parallel.processes import groups

    plans = maps.plans(arguments, run)
    tokenizer = tokenizer_of(arguments.checkpoint, run.data.tokenizer)
    asked = QuestionsConfig(
        path=arguments.file,
        prompt_field=arguments.prompt_field,
        answers_field=arguments.answers_field,
        chat=arguments.chat,
        number=arguments.number,
        new_tokens=arguments.new_tokens,
        batch_size=arguments.batch_size,
    )
    questions = read_questions(asked, run, tokenizer, ("--prompt-field", "--answers-field"))
    world = groups.start(run.parallel)
    engine = frozen_model(run, arguments.checkpoint, world)
    scores = answer_questions(
        engine,
        run,
        world,
        tokenizer,
        questions,
        {name.removeprefix("loss@"): plan for name, plan in plans.items()},
        asked=asked,
        ends=frozenset(end_tokens(origin_of(arguments.checkpoint), tokenizer)),
        on_batch=_progress(len(questions) * len(plans) // world.data_size, shown=world.is_first),
    )
    if world.is_first:
        print(_table(scores, run.model.num_layers, [len(set(plan.table)) for plan in plans.values()]))
        if arguments.json is not None:
            maps.write_json(arguments.json, {name: score.as_json() for name, score in scores.items()})
    groups.stop()
    return 0


def _progress(total: int, *, shown: bool) -> Callable[[int], None]:
    from tqdm import tqdm

    bar = tqdm(total=total, desc="answers", unit="question", disable=not shown)

    def update(count: int) -> None:
        bar.update(count)

    return update


def _table(scores: "dict[str, Score]", num_layers: int, owners: list[int]) -> str:
    lines = [f"{'retention':<16} {'cached layers':>13} {'bytes/token':>12} {'exact match':>12} {'F1':>7}"]
    for (name, score), kept in zip(scores.items(), owners):
        cached = f"{kept} of {num_layers}"
        lines.append(
            f"{name:<16} {cached:>13} {score.cache_bytes_per_token:>12,} {score.exact_match:>12.2f} "
            f"{score.token_f1:>7.2f}"
        )
    return "\n".join(lines)
