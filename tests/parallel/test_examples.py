"""Packed examples: loss and every gradient are those of each example alone, in every layout."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from skv_tools.convert.names import entries, fuse, split

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.config.run import RunConfig
from skv_dist.data.open import open_data
from skv_dist.data.tokenizer import ByteTokenizer
from tests.model.plain import routed_logits
from tests.support.compare import worst
from tests.support.jobs.examples import gradients_of_examples
from tests.support.settings import GLOBAL_BATCH, VOCAB_OF_BYTES, config

LENGTH = 24
TABLE = [0, 0, 2, 2, 2, 5, 5, 7]
Samples = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def settings(micro_batch_size: int = 2, rank: int = 0, **parallel: Any) -> dict[str, Any]:
    return config(
        lora={"rank": rank, "alpha": 5.0},
        model={"vocab_size": VOCAB_OF_BYTES},
        data={"sequence_length": LENGTH, "reset_attention": True},
        train={"micro_batch_size": micro_batch_size},
        parallel={"zero_stage": 0, **parallel},
    )


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """One global batch of packed examples, of which some begin with what others end with."""
    folder = tmp_path_factory.mktemp("examples")
    lines = [{"q": "ab" * (1 + i % 5), "a": "cde"[: 1 + i % 3] * (1 + i % 2)} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = SourceConfig(path=str(folder / "rows.jsonl"), format="jsonl", prompt_field="q", response_field="a")
    data = DataConfig(
        sources=[source],
        sequence_length=LENGTH,
        reset_attention=True,
        validation_fraction=0,
        cache_dir=str(folder / "cache"),
    )
    train, _ = open_data(data, ByteTokenizer(), 0, lambda: None)
    chosen = [train[position] for position in range(GLOBAL_BATCH)]
    assert sum(int(sample.documents.max()) for sample in chosen) > GLOBAL_BATCH
    return [(sample.tokens, sample.documents, sample.counts) for sample in chosen]  # type: ignore[misc]


def with_adapters(weights: dict[str, torch.Tensor], run: RunConfig) -> dict[str, torch.Tensor]:
    """Each weight with what its adapters add, put in place by the converter's own names."""
    sums = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for entry in entries(run.model):
        if entry.ours is None:
            continue
        parts = split(entry, weights[entry.ours], run.model)
        for place, theirs in enumerate(entry.theirs):
            module, part = entry.ours.removesuffix(".weight"), theirs.split(".")[-2].removesuffix("_proj")
            if (a := weights.get(f"{module}.lora_A.{part}")) is not None:
                parts[place] = parts[place] + run.lora.alpha / run.lora.rank * weights[f"{module}.lora_B.{part}"] @ a
        sums[entry.ours] = fuse(entry, parts, run.model)
    return sums


def alone(samples: Samples, parameters: dict[str, np.ndarray], rank: int = 0) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients with each example in a forward of its own, by a plain model in double precision."""
    run = RunConfig.model_validate(settings(rank=rank))
    leaves = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in parameters.items()}
    weights = with_adapters(leaves, run)
    total, counted = torch.zeros([], dtype=torch.float64), 0
    for tokens, documents, counts in samples:
        for document in range(int(documents.max()) + 1):
            own = torch.from_numpy(tokens[documents == document])[None]
            answers = torch.from_numpy(counts[documents == document])
            if not answers.any():  # padding
                continue
            logits = routed_logits(weights, run.model, own[:, :-1], tuple(TABLE))[0]
            total = total + torch.nn.functional.cross_entropy(
                logits[answers[1:]], own[0, 1:][answers[1:]], reduction="sum"
            )
            counted += int(answers[1:].sum())
    loss = total / counted
    loss.backward()
    # Nobody reads the K/V of a layer that borrows and does not lend: its key norm has no gradient.
    gradients = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in leaves.items()}
    return loss.item(), {name: gradient.numpy() for name, gradient in gradients.items()}


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [
        (1, {}),
        (2, {"tensor": 2, "sequence_parallel": True}),
        (2, {"pipeline": 2}),
        (2, {"zero_stage": 2}),
    ],
    ids=str,
)
def test_a_packed_example_learns_as_if_alone(
    workers: Any, samples: Samples, processes: int, parallel: dict[str, Any]
) -> None:
    found = workers(processes)(gradients_of_examples, settings(**parallel), samples, TABLE)[0]
    loss, gradients = alone(samples, found["parameters"])
    assert abs(found["loss"] - loss) < 1e-5 * loss
    error, name = worst(found["gradients"], gradients)
    assert error < 1e-5, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [(2, {"tensor": 2, "sequence_parallel": True}), (2, {"pipeline": 2}), (2, {"zero_stage": 2})],
    ids=str,
)
def test_adapters_learn_from_each_example_alone(
    workers: Any, samples: Samples, processes: int, parallel: dict[str, Any]
) -> None:
    found = workers(processes)(gradients_of_examples, settings(rank=3, **parallel), samples, TABLE, "adapters_drawn")[0]
    loss, gradients = alone(samples, found["parameters"], rank=3)
    assert abs(found["loss"] - loss) < 1e-5 * loss
    adapters = {name for name in gradients if ".lora_" in name}
    assert len(adapters) == 2 * 7 * len(TABLE)
    error, name = worst(*({n: of[n] for n in adapters} for of in (found["gradients"], gradients)))
    assert error < 1e-5, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("wrong", ["label off by one", "prompt counts", "neighbour leaks"])
def test_the_comparison_notices(workers: Any, samples: Samples, wrong: str) -> None:
    changed: Samples = []
    for tokens, documents, counts in samples:
        if wrong == "label off by one":
            changed.append((tokens, documents, np.roll(counts, 1)))
        elif wrong == "prompt counts":
            changed.append((tokens, documents, np.ones_like(counts)))
        else:
            changed.append((tokens, np.zeros_like(documents), counts))
    found = workers(1)(gradients_of_examples, settings(), changed, TABLE)[0]
    _, gradients = alone(samples, found["parameters"])
    assert worst(found["gradients"], gradients)[0] > 1e-3
