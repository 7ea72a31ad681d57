"""Sampled text: token by token what a plain model says."""

from typing import Any

import numpy as np
import pytest
import torch

from skv_dist.config.run import RunConfig
from skv_dist.data.tokenizer import ByteTokenizer
from tests.model.plain import routed_logits
from tests.support.compare import one_process
from tests.support.jobs.evaluation import sampled_tokens
from tests.support.settings import VOCAB_OF_BYTES, config

TABLE = [0, 0, 2, 2, 2, 5, 5, 0]
PROMPT = "a few words"
NEW, LENGTH = 12, 16  # more than the model sees
SPLIT = {"tensor": 2, "sequence_parallel": True}


def settings(**parallel: Any) -> dict[str, Any]:
    return config(model={"init_std": 0.3, "vocab_size": VOCAB_OF_BYTES}, parallel={"zero_stage": 0, **parallel})


@pytest.fixture(scope="module")
def weights(workers: Any) -> dict[str, np.ndarray]:
    return one_process(workers, settings(), steps=0)["parameters"]


def sample(
    workers: Any, weights: dict[str, np.ndarray], temperature: float, seed: int = 0, **parallel: Any
) -> list[int]:
    given = {"new_tokens": NEW, "temperature": temperature, "max_length": LENGTH, "seed": seed}
    size = parallel.get("tensor", 1)
    answers = workers(size)(_sample, settings(**parallel), weights, given)
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def _sample(settings: dict[str, Any], weights: dict[str, np.ndarray], given: dict[str, Any]) -> list[int]:
    return sampled_tokens(settings, weights, TABLE, PROMPT, **given)


def likeliest(weights: dict[str, np.ndarray]) -> list[int]:
    run = RunConfig.model_validate(settings())
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in weights.items()}
    ids = ByteTokenizer().encode(PROMPT).tolist()
    begin = len(ids)
    for _ in range(NEW):
        logits = routed_logits(tensors, run.model, torch.tensor([ids[-LENGTH:]]), tuple(TABLE))  # [1, s, v]
        ids.append(int(logits[0, -1].argmax()))
    return ids[begin:]


@pytest.mark.parametrize("parallel", [{}, SPLIT], ids=str)
def test_without_temperature_each_token_is_the_likeliest(
    workers: Any, weights: dict[str, np.ndarray], parallel: dict[str, Any]
) -> None:
    expected = likeliest(weights)
    assert len(set(expected)) > 3
    assert sample(workers, weights, 0.0, **parallel) == expected


def test_a_seed_repeats_and_another_does_not(workers: Any, weights: dict[str, np.ndarray]) -> None:
    one = sample(workers, weights, 1.0)
    assert sample(workers, weights, 1.0) == one
    assert sample(workers, weights, 1.0, seed=1) != one
    assert sample(workers, weights, 1e-6) == sample(workers, weights, 0.0)


def test_text_ends_where_a_document_ends(workers: Any, weights: dict[str, np.ndarray]) -> None:
    first = likeliest(weights)[0]
    head = weights["output_layer.weight"].copy()
    head[[first, ByteTokenizer.end_of_document]] = head[[ByteTokenizer.end_of_document, first]]
    assert sample(workers, {**weights, "output_layer.weight": head}, 0.0) == []
