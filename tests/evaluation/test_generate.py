"""Decoding with a cache of the owners alone: token by token what a plain model says without one."""

from typing import Any

import numpy as np
import pytest
import torch

from skv_dist.config.run import RunConfig
from skv_dist.data.tokenizer import ByteTokenizer
from tests.model.plain import routed_logits
from tests.support.compare import one_process
from tests.support.jobs.evaluation import decoded, sampled_tokens
from tests.support.settings import VOCAB_OF_BYTES, config

TABLE = [0, 0, 2, 2, 2, 5, 5, 0]  # one layer reads an owner that is not the nearest
PROMPT = "a few words"
NEW, LENGTH = 12, 16  # more than the model sees
LAYOUTS: list[dict[str, int]] = [{}, {"tensor": 2}, {"pipeline": 2}]


def settings(length: int = LENGTH, **parallel: Any) -> dict[str, Any]:
    return config(
        model={"init_std": 0.3, "vocab_size": VOCAB_OF_BYTES},
        data={"sequence_length": length},
        parallel={"zero_stage": 0, **parallel},
    )


@pytest.fixture(scope="module")
def weights(workers: Any) -> dict[str, np.ndarray]:
    return one_process(workers, settings(), steps=0)["parameters"]


def sample(
    workers: Any, weights: dict[str, np.ndarray], temperature: float, seed: int = 0, **parallel: Any
) -> list[int]:
    given = {"new_tokens": NEW, "temperature": temperature, "seed": seed}
    size = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    answers = workers(size)(_sample, settings(**parallel), weights, given)
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def _sample(settings: dict[str, Any], weights: dict[str, np.ndarray], given: dict[str, Any]) -> list[int]:
    return sampled_tokens(settings, weights, TABLE, PROMPT, **given)


def likeliest(weights: dict[str, np.ndarray], ids: list[int], new_tokens: int) -> list[int]:
    """By a plain model in fp64 that computes the whole context anew for each token."""
    run = RunConfig.model_validate(settings())
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in weights.items()}
    ids = list(ids)
    for _ in range(new_tokens):
        logits = routed_logits(tensors, run.model, torch.tensor([ids]), tuple(TABLE))  # [1, s, v]
        ids.append(int(logits[0, -1].argmax()))
    return ids[-new_tokens:]


def likeliest_within_window(weights: dict[str, np.ndarray]) -> list[int]:
    """`NEW` tokens behind `PROMPT`; where `LENGTH` is reached, on goes its second half."""
    prompt = ByteTokenizer().encode(PROMPT).tolist()
    said = likeliest(weights, prompt, LENGTH - len(prompt))
    return said + likeliest(weights, (prompt + said)[-LENGTH // 2 :], NEW - len(said))


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_without_temperature_each_token_is_the_likeliest(
    workers: Any, weights: dict[str, np.ndarray], parallel: dict[str, Any]
) -> None:
    expected = likeliest_within_window(weights)
    assert len(set(expected)) > 3
    assert sample(workers, weights, 0.0, **parallel) == expected


def test_a_seed_repeats_and_another_does_not(workers: Any, weights: dict[str, np.ndarray]) -> None:
    one = sample(workers, weights, 1.0)
    assert sample(workers, weights, 1.0) == one
    assert sample(workers, weights, 1.0, seed=1) != one
    assert sample(workers, weights, 1e-6) == sample(workers, weights, 0.0)


def test_text_ends_where_a_document_ends(workers: Any, weights: dict[str, np.ndarray]) -> None:
    first = likeliest_within_window(weights)[0]
    head = weights["output_layer.weight"].copy()
    head[[first, ByteTokenizer.end_of_document]] = head[[ByteTokenizer.end_of_document, first]]
    assert sample(workers, {**weights, "output_layer.weight": head}, 0.0) == []


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_prompts_of_a_batch_do_not_see_each_other(
    workers: Any, weights: dict[str, np.ndarray], parallel: dict[str, Any]
) -> None:
    prompts = [ByteTokenizer().encode(text).tolist() for text in ("one", "a longer prompt", "x")]
    expected = [likeliest(weights, prompt, 5) for prompt in prompts]
    size = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    asked = (settings(64, **parallel), weights, TABLE, prompts, 5, [])
    given = workers(size)(decoded, *asked)
    assert [answers for answers, _ in given] == [expected] * size
    # Owners 0, 2 and 5; with two stages the second reads the K/V of the first too, and has to keep them.
    run = RunConfig.model_validate(settings())
    of_a_layer = 2 * run.model.num_kv_heads * run.model.kv_channels * 4
    kept = {"{}": [3], "{'tensor': 2}": [1.5, 1.5], "{'pipeline': 2}": [2, 3]}[str(parallel)]
    assert [size for _, size in given] == [int(part * of_a_layer) for part in kept]


def test_an_answer_ends_at_its_own_end_token(workers: Any, weights: dict[str, np.ndarray]) -> None:
    prompts = [ByteTokenizer().encode(text).tolist() for text in ("one", "a longer prompt")]
    whole = [likeliest(weights, prompt, 6) for prompt in prompts]
    end = whole[0][2]
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in whole]
    assert len(expected[0]) < 6
    ((given, _),) = workers(1)(decoded, settings(64), weights, TABLE, prompts, 6, [end])
    assert given == expected


def test_an_answer_that_is_complete_goes_no_further(workers: Any, weights: dict[str, np.ndarray]) -> None:
    prompts = [ByteTokenizer().encode(text).tolist() for text in ("one", "a longer prompt")]
    ((given, _),) = workers(1)(decoded, settings(64), weights, TABLE, prompts, 6, [], 2)
    assert given == [likeliest(weights, prompt, 2) for prompt in prompts]
