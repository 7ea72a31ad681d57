"""What travels between stages: exactly the hidden state and the K/V that are still read."""

from typing import Any

import pytest
import torch

from tests.support.jobs.wire import missing_source, sent_once_emptied, wire
from tests.support.settings import BASE, SEQUENCE, config

HIDDEN = BASE["model"]["hidden_size"]
ROWS_X_BATCH = SEQUENCE * 2
FP32 = 4


def kv_columns(tensor: int, sp: bool) -> int:
    """Columns of one layer's K and V on one rank: 2 x heads x width, folded with sequence parallelism."""
    heads = BASE["model"]["num_kv_heads"] // tensor
    width = HIDDEN // BASE["model"]["num_attention_heads"]
    return 2 * heads * width * (tensor if sp else 1)


def live(table: tuple[int, ...], boundary: int) -> set[int]:
    """Sources before layer ``boundary`` that a layer from there on reads: from the table alone."""
    return {source for source in table[boundary:] if source < boundary}


@pytest.mark.parametrize(
    ("tensor", "sp", "pipeline", "policy"),
    [
        (1, False, 2, "r_cla"),
        (1, False, 4, "r_cla"),
        (2, True, 2, "r_cla"),
        (1, False, 2, "none"),
        (1, False, 2, "suffix"),
    ],
)
def test_1f1b_sends_not_a_byte_more(workers: Any, tensor: int, sp: bool, pipeline: int, policy: str) -> None:
    settings = config(
        parallel={"tensor": tensor, "sequence_parallel": sp, "pipeline": pipeline},
        routing={"policy": policy, "shared_layers": 3},
    )
    found = workers(tensor * pipeline)(wire, settings)
    each, cut = kv_columns(tensor, sp), 8 // pipeline
    rows = ROWS_X_BATCH // (tensor if sp else 1)

    def crossing(stage: int) -> list[int]:
        """Bytes of each micro-batch's K/V behind a stage."""
        if not 0 <= stage < pipeline - 1:
            return []
        return [len(live(table, (stage + 1) * cut)) * each * rows * FP32 for table in found[0]["tables"]]

    for rank, answer in enumerate(found):
        stage = rank // tensor
        hidden = HIDDEN * rows * FP32
        # hidden state and K/V onwards, the gradients of both back
        assert answer["sent"] == sum(hidden + kv for kv in crossing(stage) + crossing(stage - 1))
        # 1F1B has pipeline - stage micro-batches in flight; Megatron's schedule holds on to the one before as well.
        in_flight, received = pipeline - stage + 1, crossing(stage - 1)
        windows = [sum(received[i : i + in_flight]) for i in range(len(received))] or [0]
        assert answer["held"] == max(windows)


def test_the_interleaved_schedule_pads_to_the_widest(workers: Any) -> None:
    found = workers(2)(wire, config(parallel={"pipeline": 2, "virtual_pipeline": 2}))
    each = kv_columns(1, False)
    counts = [len(live(table, boundary)) for table in found[0]["tables"] for boundary in (2, 4, 6)]
    widest = HIDDEN + max(counts) * each
    sent = sum(answer["sent"] for answer in found)
    assert sent == 2 * len(counts) * widest * ROWS_X_BATCH * FP32
    exact = 2 * sum(HIDDEN + count * each for count in counts) * ROWS_X_BATCH * FP32
    assert 1.0 < sent / exact < 2.0


def test_packing_and_unpacking_are_inverse_with_gradients() -> None:
    from skv_dist.model.attention import KV
    from skv_dist.parallel.wire.packing import Packing

    length, batch, heads, width, hidden_size = 8, 3, 2, 4, 6
    for rows in (8, 4):
        packing = Packing(hidden_size, heads, width, sequence_split=length // rows)
        hidden = torch.randn(rows, batch, hidden_size, requires_grad=True)
        kv = {s: KV(*torch.randn(2, length, batch, heads, width).unbind()) for s in (1, 3, 4)}
        for pair in kv.values():
            pair.key.requires_grad_()
            pair.value.requires_grad_()
        packed = packing.pack(hidden, kv, (1, 4))
        assert packed.shape == (rows, batch, hidden_size + 4 * heads * width * length // rows)
        assert packed.shape[-1] == packing.width(2)
        padded = packing.pack(hidden, kv, (1, 4), packed.shape[-1] + 5)
        for tensor in (packed, padded):
            back, live_kv = packing.unpack(tensor, (1, 4))
            assert torch.equal(back, hidden)
            parts = (back, *(part for pair in live_kv.values() for part in (pair.key, pair.value)))
            assert all(part.is_contiguous() for part in parts)  # or a compiled layer is compiled for every width
            assert live_kv.keys() == {1, 4}
            for source, pair in live_kv.items():
                assert torch.equal(pair.key, kv[source].key)
                assert torch.equal(pair.value, kv[source].value)
            weight = torch.randn_like(kv[4].key)
            (live_kv[4].key * weight).sum().backward()
            assert torch.equal(kv[4].key.grad, weight)  # type: ignore[arg-type]
            kv[4].key.grad = None
        assert kv[3].key.grad is None


def test_a_source_that_did_not_come_is_an_error(workers: Any) -> None:
    (message,) = workers(1)(missing_source, config(parallel={"zero_stage": 0}))
    assert message == "layer 5 reads the K/V of layer 1, which is not on this stage (layers 5..7)"


def test_what_is_sent_outlives_the_tensor_that_the_schedule_empties(workers: Any) -> None:
    settings = config(parallel={"zero_stage": 0})
    assert workers(1)(sent_once_emptied, settings, None)[0] == [1.0] * 6
    assert workers(1)(sent_once_emptied, settings, "sent_tensor_emptied")[0] != [1.0] * 6
