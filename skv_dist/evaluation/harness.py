"""A checkpoint under one sharing map, as a model of EleutherAI's lm-evaluation-harness (package ``lm_eval``).

Tokens, truncation and sums are those of its own ``--model hf``, so that figures can be set beside others.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from megatron.core import parallel_state
from tqdm import tqdm

from skv_dist.config.run import RunConfig
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError
from skv_dist.parallel.decode import Decoder, likeliest
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.processes.groups import World
from skv_dist.parallel.score import Scorer, Target
from skv_dist.routing import RoutePlan

Texts = tuple[str, str]
Request = tuple[Texts, list[int], list[int]]  # context and continuation, and the ids of both
Key = TypeVar("Key")
Found = TypeVar("Found")

_DEFAULT_NEW_TOKENS = 256  # as in lm_eval
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # in lm_eval's order
_WITHOUT_EFFECT = ("temperature", "top_p", "top_k")  # where the likeliest token is taken


class Asked(NamedTuple):
    """What a task asks of generated text.

    Attributes:
        until: texts that end an answer, and are no part of it.
        new_tokens: largest length of an answer.
    """

    until: tuple[str, ...]
    new_tokens: int


def asked_of(task: Mapping[str, Any], max_length: int) -> Asked:
    """``generation_kwargs`` of a task.

    Args:
        max_length: tokens that the model can see.

    Raises:
        UserError: it asks for something else than the likeliest tokens, or for more than the model can see.
    """
    given = dict(task)
    until = given.pop("until", None) or []
    lengths = [given.pop(name) for name in _NEW_TOKENS if given.get(name) is not None]
    temperature = given.get("temperature") or 0
    sampled = given.pop("do_sample", None)
    if sampled or (sampled is None and temperature > 0):
        raise UserError(
            "a task asks for sampled text (do_sample: true), and skv-eval harness takes the likeliest token alone: "
            "leave the task out, or run lm_eval on an export of the checkpoint (skv-convert to-hf)"
        )
    unknown = [name for name, value in given.items() if name not in (*_WITHOUT_EFFECT, *_NEW_TOKENS) and value]
    if unknown:
        raise UserError(
            f"a task's generation_kwargs ask for {unknown[0]}, which skv-eval harness does not know: leave the task "
            "out, or run lm_eval on an export of the checkpoint (skv-convert to-hf)"
        )
    new_tokens = int(lengths[0]) if lengths else _DEFAULT_NEW_TOKENS
    if new_tokens >= max_length:
        raise UserError(
            f"a task asks for {new_tokens} new tokens (max_gen_toks), which leave no room for a prompt in "
            f"model.max_position_embeddings {max_length}: leave the task out"
        )
    return Asked(tuple(text for text in ([until] if isinstance(until, str) else until) if text), new_tokens)


class HarnessModel(TemplateLM):
    """All ranks give all requests, and get all answers; inside, replicas share the work out. Collective.

    Args:
        ends: tokens that end generated text.
        batch_size: sequences that are computed together.
    """

    def __init__(
        self,
        engine: Engine,
        run: RunConfig,
        world: World,
        tokenizer: Tokenizer,
        plan: RoutePlan,
        ends: frozenset[int],
        batch_size: int,
    ) -> None:
        super().__init__()
        self._scorer, self._decoder = Scorer(engine, run, plan), Decoder(engine, run, plan)
        self._world, self._tokenizer = world, tokenizer
        self._ends, self._batch_size = ends, batch_size
        self.max_length = run.model.max_position_embeddings
        self.tokenizer = getattr(tokenizer, "stock", None)  # from which lm_eval takes the chat template

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        begin = getattr(self.tokenizer, "bos_token_id", None)
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise UserError(f"data.tokenizer '{self._tokenizer.name}' has no chat template: leave --chat out")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """With the token that the tokenizer itself puts before a text, unless it is there or is not wanted."""
        ids = [int(i) for i in self._tokenizer.encode(string)]
        begin = self._tokenizer.begin_of_document
        if begin is None or add_special_tokens is False or (add_special_tokens is None and ids[:1] == [begin]):
            return ids
        return [begin, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        # Answers of one token to one question have the same input, which is computed once.
        targets: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        keys = []
        for _texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a task asks for the likelihood of {len(continuation)} tokens at once, more than "
                    f"model.max_position_embeddings {self.max_length}: leave the task out"
                )
            whole = (*context, *continuation)[-(self.max_length + 1) :]
            keys.append((whole[:-1], tuple(continuation)))
            targets.setdefault(whole[:-1], {})[tuple(continuation)] = None

        def score(batch: list[tuple[int, ...]]) -> list[dict[tuple[int, ...], tuple[float, bool]]]:
            wanted = [Target(row, labels) for row, ids in enumerate(batch) for labels in targets[ids]]
            found: list[dict[tuple[int, ...], tuple[float, bool]]] = [{} for _ in batch]
            for target, likelihood in zip(wanted, self._scorer.score(batch, wanted)):
                found[target.row][tuple(target.labels)] = (likelihood.log_prob, likelihood.is_greedy)
            return found

        answers = self._shared_out(targets, len, score, "log-likelihoods")
        return [answers[ids][labels] for ids, labels in keys]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[list[Request]] = []
        for request in requests:
            (text,) = request.args
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows.append([(("", ""), *make_disjoint_window(window)) for window in cut])
        scored = iter(self._loglikelihood_tokens([window for of_one in windows for window in of_one]))
        return [math.fsum(next(scored)[0] for _ in of_one) for of_one in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        keys = [(context, asked_of(task, self.max_length)) for context, task in (request.args for request in requests)]
        prompts: dict[Asked, dict[str, list[int]]] = {}
        for context, asked in keys:
            room = self.max_length - asked.new_tokens
            prompts.setdefault(asked, {})[context] = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        said = {}
        for asked, ids in prompts.items():
            answers = self._shared_out(
                ids,
                lambda context, ids=ids: len(ids[context]),  # type: ignore[misc]
                lambda batch, ids=ids, asked=asked: self._continue([ids[context] for context in batch], asked),  # type: ignore[misc]
                "answers",
            )
            said.update({(context, asked): answer for context, answer in answers.items()})
        return [said[key] for key in keys]

    def _continue(self, prompts: list[list[int]], asked: Asked) -> list[str]:
        most = 1 + max((len(text.encode()) for text in asked.until), default=0)  # tokens that one of the texts takes

        def is_complete(answer: list[int]) -> bool:
            end = self._tokenizer.spell(answer[-most:])  # tasks name special tokens too
            return any(text in end for text in asked.until)

        answers = self._decoder.continue_prompts(
            prompts, asked.new_tokens, self._ends, likeliest, self.eot_token_id, is_complete
        )
        texts = [self._tokenizer.decode(answer) for answer in answers]
        for text in asked.until:
            texts = [answer.split(text)[0] for answer in texts]
        return texts

    def _shared_out(
        self,
        work: Iterable[Key],
        length: Callable[[Key], int],
        answer: Callable[[list[Key]], list[Found]],
        unit: str,
    ) -> dict[Key, Found]:
        """``answer`` to each piece of ``work``, from batches that the replicas share out."""
        # Sequences of one length lie together, so that little is padded.
        order = sorted(work, key=length, reverse=True)
        batches = [order[begin : begin + self._batch_size] for begin in range(0, len(order), self._batch_size)]
        mine: list[tuple[Key, Found]] = []
        rank, replicas = self._world.data_rank, self._world.data_size
        for batch in tqdm(batches[rank::replicas], desc=unit, unit="batch", disable=not self._world.is_first):
            mine += zip(batch, answer(batch))
        gathered: list[Any] = [None] * replicas
        dist.all_gather_object(gathered, mine, group=parallel_state.get_data_parallel_group())
        return dict(pair for part in gathered for pair in part)
