"""Tasks of lm-evaluation-harness: loaded once, and run on a model."""

import contextlib
import difflib
import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from skv_dist.errors import UserError, cause_in_one_line
from skv_dist.evaluation.harness import HarnessModel, asked_of

Tasks = dict[str, Any]  # as lm_eval loads them: tasks, groups, group_map

_SEED, _SEED_OF_EXAMPLES = 0, 1234  # as in lm_eval
_RESAMPLINGS = 100_000  # likewise, for standard errors that have no formula


def load_tasks(names: Sequence[str], folder: Path | None, num_fewshot: int | None, max_length: int) -> Tasks:
    """Tasks and groups by name, with their data.

    Args:
        names: patterns such as ``mmlu_*`` too.
        folder: of further tasks.
        num_fewshot: examples before each question, except in tasks that are meant to have none.
        max_length: tokens that the model can see.

    Raises:
        UserError: there is no such task, it or its data cannot be loaded, or it asks for what cannot be done here.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"--include-path {folder} is no folder")
    _seed()
    with _naming("the tasks of lm_eval cannot be read"):
        manager = TaskManager(include_path=None if folder is None else str(folder))
    found = [_matching(manager, name) for name in names]
    wanted = list(dict.fromkeys(task for some in found for task in some))
    with _naming(f"{', '.join(names)} cannot be loaded"):
        loaded: Tasks = manager.load(wanted)
    for name, task in loaded["tasks"].items():
        _check(name, task, max_length)
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return loaded


def _matching(manager: Any, name: str) -> list[str]:
    found: list[str] = manager.match_tasks([name])
    if not found:
        close = difflib.get_close_matches(name, manager.all_tasks, 3)
        cure = f"did you mean {', '.join(close)}?" if close else "lm_eval ls tasks lists them"
        raise UserError(f"lm_eval has no task '{name}': {cure}")
    return found


@contextlib.contextmanager
def _naming(problem: str) -> Iterator[None]:
    """Whatever fails inside, in one line behind ``problem``: code of tasks and of data sets, which may raise anything.

    Raises:
        UserError: in its place.
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"{problem}: {cause_in_one_line(error)}") from error


def _check(name: str, task: Any, max_length: int) -> None:
    refused = "images" if getattr(task, "MULTIMODAL", False) else None
    if getattr(task, "UNSAFE_CODE", False):
        refused = "code that the model wrote to be run"
    if refused:
        raise UserError(f"task '{name}' asks for {refused}, which skv-eval harness does not do: leave it out")
    if task.get_config("output_type") == "generate_until":
        try:
            asked_of(task.get_config("generation_kwargs") or {}, max_length)
        except UserError as error:
            raise UserError(f"task '{name}': {error}") from error


def run_tasks(
    model: HarnessModel, tasks: Tasks, *, limit: int | None, chat: bool, log_samples: bool, first: bool
) -> dict[str, Any]:
    """What lm_eval's own evaluation gives, as JSON holds it. Collective.

    Args:
        limit: take the first so many documents of each task.
        chat: prompts go through the chat template.
        log_samples: each document with its requests and answers is part of the result.
        first: this rank, whose standard errors alone are shown.
    """
    _seed()
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=_SEED_OF_EXAMPLES)  # the same examples under each map
    found = evaluate(
        model,
        tasks,
        limit=limit,
        bootstrap_iters=_RESAMPLINGS if first else 0,
        log_samples=log_samples,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    plain: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
    return plain


def _seed() -> None:
    """Some tasks shuffle their documents by generators of the whole process."""
    random.seed(_SEED)
    np.random.seed(_SEED_OF_EXAMPLES)


def quiet_unless(shown: bool) -> contextlib.AbstractContextManager[Any]:
    """All ranks run lm_eval, which knows nothing of the others and would report from each."""
    if shown:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack
