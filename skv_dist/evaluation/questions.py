"""Questions answered by a model under several sharing maps, and how many it gets right."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.data import SourceConfig
from skv_dist.config.run import RunConfig
from skv_dist.config.train import SCORES, QuestionsConfig
from skv_dist.data.local_files import format_of
from skv_dist.data.read_file import rows
from skv_dist.data.row_documents import NoDocumentError, TextTemplate
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError
from skv_dist.evaluation.answer_scores import exact_match, token_f1
from skv_dist.model.megatron_config import DTYPES
from skv_dist.parallel.decode import Decoder, likeliest
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.processes.groups import World
from skv_dist.routing import RoutePlan


class Question(NamedTuple):
    """A prompt as tokens, and the answers that are right."""

    prompt: list[int]
    references: list[str]


def read_questions(
    asked: QuestionsConfig,
    run: RunConfig,
    tokenizer: Tokenizer,
    names: tuple[str, str] = ("eval.questions.prompt_field", "eval.questions.answers_field"),
) -> list[Question]:
    """The questions of a file, in its order.

    Args:
        names: what a user calls the fields of the prompt and of the answers.

    Raises:
        UserError: the file cannot be read, a row holds no question (naming the row), the form of the questions is not
            known, or a prompt is too long for the model.
    """
    trained = next((source for source in run.data.sources if source.prompt_field is not None), None)
    prompt = asked.prompt_field or (trained.prompt_field if trained else None)
    answers = asked.answers_field or _single_field(trained)
    if prompt is None or answers is None:
        raise UserError(
            "no source of the run has prompts, and answers that are one field, so that questions have no form: give "
            f"{names[0]} and {names[1]}"
        )
    if not Path(asked.path).expanduser().is_file():
        raise UserError(f"{asked.path} is no file")
    template = TextTemplate(prompt, names[0])
    source = SourceConfig(path=asked.path, format="parquet" if format_of(asked.path) == "parquet" else "jsonl")
    questions = _rows(source, template, answers, tokenizer, asked)
    longest = max(len(question.prompt) for question in questions)
    if longest + asked.new_tokens > run.model.max_position_embeddings:
        raise UserError(
            f"'{source.path}': a prompt of {longest} tokens and {asked.new_tokens} new ones are more than "
            f"model.max_position_embeddings {run.model.max_position_embeddings}: leave long questions out"
        )
    return questions


def _single_field(source: SourceConfig | None) -> str | None:
    if source is None or source.response_field is None:
        return None
    fields = TextTemplate(source.response_field, "response_field").fields
    return fields[0] if len(fields) == 1 else None


def _rows(
    source: SourceConfig, template: TextTemplate, answers: str, tokenizer: Tokenizer, asked: QuestionsConfig
) -> list[Question]:
    questions = []
    # What is behind the last one that is asked for is not read.
    for number, row in islice(rows(source.path, source.format, [*template.fields, answers]), asked.number):
        try:
            text = template.text(row)
            references = row[answers]
        except (NoDocumentError, KeyError) as error:
            raise UserError(f"'{source.path}' row {number} is no question: {error}") from error
        except UserError as error:
            raise UserError(f"'{source.path}' row {number}: {error}") from error
        right = [references] if isinstance(references, str) else references
        if not (isinstance(right, list) and right and all(isinstance(text, str) for text in right)):
            raise UserError(f"'{source.path}' row {number}: field '{answers}' is no text and no list of texts")
        questions.append(Question(_prompt_ids(tokenizer, text, asked.chat), right))
    if not questions:
        raise UserError(f"'{source.path}' holds no questions")
    return questions


def _prompt_ids(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    if chat:
        return tokenizer.encode_prompt([{"role": "user", "content": text}])
    begin = [] if tokenizer.begin_of_document is None else [tokenizer.begin_of_document]
    return [*begin, *(int(i) for i in tokenizer.encode(text))]


class Answer(NamedTuple):
    """What a model said to a question, and its scores from 0 to 1."""

    number: int
    text: str
    exact_match: float
    token_f1: float


@dataclass(frozen=True)
class Score:
    """Means over all questions under one map.

    Attributes:
        exact_match, token_f1: in percent, as SQuAD reports them.
        cache_bytes_per_token: K/V of one position under the map, in the run's precision.
        answers: of each question, in order; on the first rank, elsewhere empty.
    """

    exact_match: float
    token_f1: float
    cache_bytes_per_token: int
    answers: list[Answer]

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "answers": [answer._asdict() for answer in self.answers]}


def answer_questions(
    engine: Engine,
    run: RunConfig,
    world: World,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    plans: Mapping[str, RoutePlan],
    *,
    asked: QuestionsConfig,
    ends: frozenset[int],
    on_batch: Callable[[int], None] = lambda num_questions: None,
) -> dict[str, Score]:
    """Score the likeliest answers under each map. Collective; replicas share the questions out.

    Args:
        asked: says how long an answer may be, which also ends at a line break, and how many are decoded together.
        ends: tokens that end an answer.
        on_batch: called with their number behind each batch of this replica.
    """
    # Questions of one length lie together, so that little is padded.
    order = sorted(range(len(questions)), key=lambda number: (-len(questions[number].prompt), number))
    size = asked.batch_size
    batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
    scores = {}
    for name, plan in plans.items():
        decoder = Decoder(engine, run, plan)
        mine: list[Answer] = []
        with engine.gathered():  # replicas have other questions, and answers of other lengths
            for batch in batches[world.data_rank :: world.data_size]:
                prompts = [questions[number].prompt for number in batch]
                said = decoder.continue_prompts(prompts, asked.new_tokens, ends, likeliest, tokenizer.end_of_document)
                for number, ids in zip(batch, said):
                    mine.append(_scored(number, tokenizer.decode(ids), questions[number].references))
                on_batch(len(batch))
        scores[name] = _score(run, world, plan, mine)
    return scores


def ask_while_training(
    asked: QuestionsConfig,
    engine: Engine,
    run: RunConfig,
    world: World,
    tokenizer: Tokenizer,
    ends: frozenset[int],
    plans: Mapping[str, RoutePlan],
) -> Callable[[], dict[str, float]]:
    """A function that answers ``eval.questions`` with the weights as they are, and gives the scores by map, like
    ``token_f1@0.50``; the same on all ranks. Collective.

    Raises:
        UserError: as `read_questions`.
    """
    questions = read_questions(asked, run, tokenizer)

    def scores() -> dict[str, float]:
        answered = answer_questions(engine, run, world, tokenizer, questions, plans, asked=asked, ends=ends)
        return {f"{kind}@{name}": getattr(score, kind) for kind in SCORES for name, score in answered.items()}

    return scores


def _scored(number: int, said: str, references: Sequence[str]) -> Answer:
    text = said.strip().split("\n")[0].strip()
    return Answer(number, text, exact_match(text, references), token_f1(text, references))


def _score(run: RunConfig, world: World, plan: RoutePlan, mine: list[Answer]) -> Score:
    """From this replica's answers those of all. Collective."""
    group = parallel_state.get_data_parallel_group()
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, mine, group=group)
    every = sorted(answer for part in gathered for answer in part)
    exact, f1 = (100 * sum(values) / len(every) for values in zip(*[(a.exact_match, a.token_f1) for a in every]))
    return Score(exact, f1, cache_bytes_per_token(run, plan), every if world.is_first else [])


def cache_bytes_per_token(run: RunConfig, plan: RoutePlan) -> int:
    """Bytes of K/V that one position takes where the owners of ``plan`` alone keep a cache."""
    of_a_layer = 2 * run.model.num_kv_heads * run.model.kv_channels * DTYPES[run.train.precision].itemsize
    return len(set(plan.table)) * of_a_layer
