"""Questions answered by a model under several sharing maps, and how many it gets right."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.data import SourceConfig
from skv_dist.config.run import RunConfig
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
    source: SourceConfig, prompt: str, answers: str, tokenizer: Tokenizer, *, chat: bool
) -> list[Question]:
    """The questions of a file.

    Args:
        prompt: as ``data.sources.prompt_field``.
        answers: the field that holds the right answer, or a list of right answers.
        chat: whether the prompt is a user's message, which the tokenizer's template renders.

    Raises:
        UserError: the file cannot be read, or a row holds no question; naming the row.
    """
    template = TextTemplate(prompt, "--prompt-field")
    questions = []
    for number, row in rows(source.path, source.format, [*template.fields, answers]):
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
        questions.append(Question(_prompt_ids(tokenizer, text, chat), right))
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
    new_tokens: int,
    ends: frozenset[int],
    batch_size: int,
    on_batch: Callable[[int], None] = lambda num_questions: None,
) -> dict[str, Score]:
    """Score the likeliest answers under each map. Collective; replicas share the questions out.

    Args:
        new_tokens: largest number of tokens in an answer, which also ends at a line break.
        ends: tokens that end an answer.
        batch_size: questions decoded together.
        on_batch: called with their number behind each batch of this replica.

    Raises:
        UserError: a prompt is too long for the model.
    """
    longest = max(len(question.prompt) for question in questions)
    if longest + new_tokens > run.model.max_position_embeddings:
        raise UserError(
            f"a prompt of {longest} tokens and --new-tokens {new_tokens} are more than "
            f"model.max_position_embeddings {run.model.max_position_embeddings}: leave long questions out"
        )
    # Questions of one length lie together, so that little is padded.
    order = sorted(range(len(questions)), key=lambda number: (-len(questions[number].prompt), number))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    scores = {}
    for name, plan in plans.items():
        decoder = Decoder(engine, run, plan)
        mine: list[Answer] = []
        for batch in batches[world.data_rank :: world.data_size]:
            prompts = [questions[number].prompt for number in batch]
            said = decoder.continue_prompts(prompts, new_tokens, ends, likeliest, tokenizer.end_of_document)
            for number, ids in zip(batch, said):
                mine.append(_scored(number, tokenizer.decode(ids), questions[number].references))
            on_batch(len(batch))
        scores[name] = _score(run, world, plan, mine)
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
