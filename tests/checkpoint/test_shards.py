"""What each rank stores: pieces of parts as blocks of full tensors, each element once, nothing sent."""

from typing import Any

import pytest
import torch

from skv_dist.checkpoint.shards import blocks_of_piece
from skv_dist.parallel.engines.base import Piece
from skv_dist.parallel.tensor_split import Columns, Halves, Replicated, Rows, Split, Vocabulary
from tests.support.jobs.saves import noticed_payloads, snapshot_of
from tests.support.layouts import SMALL
from tests.support.settings import config

SPLITS: list[tuple[Split, tuple[int, ...]]] = [
    (Rows(2), (12, 5)),
    (Columns(2), (6, 10)),
    (Halves(2), (12, 5)),
    (Vocabulary(2, 11), (11, 5)),
    (Replicated(2), (7,)),
]


@pytest.mark.parametrize(("split", "shape"), SPLITS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("cuts", [[], [3], [4, 5], [1, 2, 17], [5, 10, 13]])
def test_pieces_of_all_ranks_make_the_full_tensor(split: Split, shape: tuple[int, ...], cuts: list[int]) -> None:
    full = torch.arange(float(torch.Size(shape).numel())).view(shape)
    found, written = torch.full(shape, -1.0), torch.zeros(shape, dtype=torch.int)
    padded = 6 if isinstance(split, Vocabulary) else None
    for rank in range(1 if isinstance(split, Replicated) else 2):
        rows = padded or (shape[0] if isinstance(split, Columns | Replicated) else shape[0] // 2)
        part_shape = (rows, shape[1] // 2) if isinstance(split, Columns) else (rows, *shape[1:])
        part = split.take(full, rank, part_shape)
        ends = [*(cut for cut in cuts if cut < part.numel()), part.numel()]
        for begin, end in zip([0, *ends], ends):
            piece = Piece(begin, part.flatten()[begin:end])
            blocks = blocks_of_piece(piece, part_shape, split.blocks(rank, part_shape))
            assert len(blocks) <= (6 if isinstance(split, Halves) else 3)
            for offsets, values in blocks.items():
                place = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape))
                found[place] = values
                written[place] += 1
    assert torch.equal(found, full)
    assert (written == 1).all()


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [
        (2, {"zero_stage": 0}),
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3}),
        (2, {"zero_stage": 3, "engine": "fsdp"}),
        (2, {"tensor": 2, "sequence_parallel": True, "zero_stage": 0}),
        (2, {"pipeline": 2, "zero_stage": 0}),
    ],
    ids=str,
)
def test_a_save_sends_nothing_and_shares_out_the_copies(workers: Any, processes: int, parallel: dict[str, Any]) -> None:
    for precision in ("fp32", "bf16"):
        settings = config(model=SMALL, parallel=parallel, train={"precision": precision})
        answers = workers(processes)(snapshot_of, settings)
        alone = workers(1)(snapshot_of, config(model=SMALL, parallel={"zero_stage": 0}))[0]
        assert [called for called, _, _ in answers] == [[]] * processes
        copied = [elements for _, elements, _ in answers]
        assert sum(copied) == alone[1]
        assert max(copied) <= alone[1] / processes + 3 * max(answers[0][2], alone[1] // 12)


def test_whatever_is_sent_is_noticed(workers: Any) -> None:
    """Or the test above would show nothing."""
    first, second = workers(2)(noticed_payloads)
    assert first == {name: [32] for name in first}
    assert second == {name: [16] if name in ("gather", "scatter") else [32] for name in first}
