"""Pipelines against one process: 1F1B and interleaved, with tensor and data parallelism, ZeRO 0-2 and recompute."""

from typing import Any

import pytest

from tests import jobs
from tests.parallel.test_parity import compare

# tensor, sequence_parallel, pipeline, virtual_pipeline, replicas
TWO = [(1, False, 2, 1, 1), (1, False, 2, 2, 1)]
FOUR = [
    (1, False, 4, 1, 1),
    (1, False, 4, 2, 1),
    (1, False, 2, 1, 2),
    (1, False, 2, 2, 2),
    (2, False, 2, 1, 1),
    (2, True, 2, 1, 1),
    (2, True, 2, 2, 1),
]
CASES = [
    *((split, zero, recompute, "r_cla") for split in TWO for zero in range(3) for recompute in ("none", "full")),
    *((split, 1, "none", policy) for split in TWO for policy in ("none", "suffix", "cla")),
    *((split, 2, "full", "r_cla") for split in FOUR),
    *((split, number % 2, "none", "r_cla") for number, split in enumerate(FOUR)),
]


@pytest.mark.parametrize(("split", "zero", "recompute", "policy"), CASES)
def test_pipeline_equals_one_process(
    workers: Any, split: tuple[int, bool, int, int, int], zero: int, recompute: str, policy: str
) -> None:
    tensor, sp, pipeline, virtual, replicas = split
    settings = jobs.config(
        parallel={
            "tensor": tensor, "sequence_parallel": sp, "pipeline": pipeline, "virtual_pipeline": virtual,
            "zero_stage": zero,
        },
        train={"recompute": recompute},
        routing={"policy": policy, "shared_layers": 3},
        model={"tie_embeddings": recompute == "full"},
    )  # fmt: skip
    compare(workers, tensor * pipeline * replicas, settings)


VARIANTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "uneven": (2, {"parallel": {"pipeline": 2, "first_stage_layers": 3}}),
    "uneven at both ends": (4, {"parallel": {"pipeline": 4, "first_stage_layers": 3, "last_stage_layers": 1}}),
    "uneven and interleaved": (
        2,
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2, "last_stage_layers": 2}, "model": {"tie_embeddings": True}},
    ),
    "fewer KV heads than tensor ranks": (
        4, {"parallel": {"pipeline": 2, "tensor": 2, "sequence_parallel": True}, "model": {"num_kv_heads": 1}}
    ),
    "attention within documents": (2, {"parallel": {"pipeline": 2}, "data": {"reset_attention": True}}),
    "layer norm and GELU": (
        2, {"parallel": {"pipeline": 2}, "model": {"norm": "layernorm", "activation": "gelu", "qk_norm": False}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_one_process(workers: Any, name: str) -> None:
    processes, sections = VARIANTS[name]
    compare(workers, processes, jobs.config(**sections))
