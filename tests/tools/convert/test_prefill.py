"""Layers at the end that all borrow run over the positions alone whose logits are wanted, and nothing else changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from skv_tools.engines.models.modeling_skv import SkvConfig, SkvForCausalLM
from transformers import DynamicCache, StaticCache

from tests.tools.small_model import LAYERS, SHAPE, VOCABULARY

LENGTH = 24
MAPS = {
    "a quarter trails": (0, 1, 2, 3, 4, 5, 5, 5),
    "half trails": (0, 1, 2, 3, 3, 3, 2, 1),
    "three quarters trail": (0, 1, 1, 0, 1, 1, 1, 0),
    "one owner": (0,) * LAYERS,
    "none trails": (0, 0, 2, 2, 4, 4, 6, 7),
}


def model(sources: tuple[int, ...], attention: str = "sdpa", **fields: Any) -> Any:
    torch.manual_seed(3)
    config = SkvConfig(
        initializer_range=0.2,  # so that attention is sharp
        kv_source_layers=list(sources),
        attn_implementation=attention,
        **SHAPE,
        **fields,
    )
    return SkvForCausalLM(config).eval()


@contextmanager
def rows_run(of: Any) -> Iterator[list[int]]:
    """Appends, layer by layer, how many positions went through it."""
    found: list[int] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, given: found.append(given[0].shape[1]))
        for layer in of.model.layers
    ]
    yield found
    for hook in hooks:
        hook.remove()


def expected_rows(sources: tuple[int, ...], rows: int, length: int = LENGTH) -> list[int]:
    return [length if layer <= max(sources) else rows for layer in range(LAYERS)]


def tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("sources", MAPS.values(), ids=MAPS)
@torch.no_grad()
def test_logits_are_those_of_whole_rows(sources: tuple[int, ...], attention: str) -> None:
    skv = model(sources, attention)
    padded = torch.ones(2, LENGTH, dtype=torch.int64)
    padded[0, :9] = 0
    for mask in (None, padded):
        whole = skv(tokens(), attention_mask=mask).logits
        with rows_run(skv) as rows:
            last = skv(tokens(), attention_mask=mask, logits_to_keep=1).logits
        assert rows == expected_rows(sources, 1)
        torch.testing.assert_close(last, whole[:, -1:], atol=1e-5, rtol=0)
        with rows_run(skv) as rows:
            five = skv(tokens(), attention_mask=mask, logits_to_keep=5).logits
        assert rows == expected_rows(sources, 5)
        torch.testing.assert_close(five, whole[:, -5:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("sources", MAPS.values(), ids=MAPS)
@torch.no_grad()
def test_a_prompt_in_chunks(sources: tuple[int, ...], kind: str) -> None:
    skv = model(sources)
    whole = skv(tokens()).logits
    cache = DynamicCache(config=skv.config) if kind == "dynamic" else StaticCache(config=skv.config, max_cache_len=40)
    for begin, end in ((0, 10), (10, 19), (19, 20), (20, 24)):
        with rows_run(skv) as rows:
            found = skv(tokens()[:, begin:end], past_key_values=cache, logits_to_keep=1).logits
        assert rows == expected_rows(sources, 1, end - begin)
        torch.testing.assert_close(found[:, -1], whole[:, end - 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"num_beams": 3},
        {"num_beams": 2, "prefill_chunk_size": 7, "cache_implementation": "static"},
    ],
    ids=str,
)
@pytest.mark.parametrize("sources", MAPS.values(), ids=MAPS)
@torch.no_grad()
def test_generation_is_the_same(
    sources: tuple[int, ...], given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    skv = model(sources)
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :9] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **given}
    first = given.get("prefill_chunk_size", LENGTH)  # positions of the first forward
    with rows_run(skv) as rows:
        skipping = skv.generate(tokens(), attention_mask=mask, **settings)
    assert rows[:LAYERS] == expected_rows(sources, 1, first)
    monkeypatch.setattr(type(skv.model), "_can_narrow", lambda *_: False)
    with rows_run(skv) as rows:
        assert torch.equal(skv.generate(tokens(), attention_mask=mask, **settings), skipping)
    assert rows[:LAYERS] == [first] * LAYERS


@pytest.mark.parametrize("sources", MAPS.values(), ids=MAPS)
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(sources: tuple[int, ...]) -> None:
    """transformers tells them apart by positions that begin anew, where there is no cache."""
    skv = model(sources)
    lengths = (10, 9, 5)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    with rows_run(skv) as rows:
        last = skv(tokens(), position_ids=positions, use_cache=False, logits_to_keep=7).logits
    assert rows == expected_rows(sources, 7)
    third, second = tokens()[:, -5:], tokens()[:, 10:19]
    alone = torch.cat([skv(second).logits[:, -2:], skv(third).logits], dim=1)
    torch.testing.assert_close(last, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("sources", MAPS.values(), ids=MAPS)
@torch.no_grad()
def test_a_mask_of_positions_by_positions(sources: tuple[int, ...], attention: str) -> None:
    skv = model(sources, attention)
    allowed = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    allowed[:, :, 12:, 1:6] = False  # causal, but for a part of the text that its end does not see
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    whole = skv(tokens(), attention_mask=added).logits
    assert (whole - skv(tokens()).logits).abs().max() > 0.1
    for mask in (added, allowed) if attention == "sdpa" else (added,):
        with rows_run(skv) as rows:
            last = skv(tokens(), attention_mask=mask, logits_to_keep=3).logits
        assert rows == expected_rows(sources, 3)
        torch.testing.assert_close(last, whole[:, -3:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_compiled_as_one_graph(dynamic: bool) -> None:
    skv = model(MAPS["half trails"]).double()  # what the compiler rounds otherwise is not what is asked
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :9] = 0
    torch._dynamo.reset()
    compiled = torch.compile(skv, fullgraph=True, dynamic=dynamic, backend="eager")
    for given in ({}, {"attention_mask": mask}, {"past_key_values": StaticCache(config=skv.config, max_cache_len=40)}):
        whole = skv(tokens(), attention_mask=given.get("attention_mask")).logits
        with rows_run(skv) as rows:
            last = compiled(tokens(), logits_to_keep=1, **given).logits
        assert rows == expected_rows(MAPS["half trails"], 1)
        torch.testing.assert_close(last, whole[:, -1:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("order", [None, [0, 1, 3, 2, 7, 6, 5, 4]])
@torch.no_grad()
def test_an_adaptive_folder_skips_what_trails_in_its_map(order: list[int] | None, tmp_path: Path) -> None:
    model(tuple(range(LAYERS)), kv_order=order).save_pretrained(tmp_path)
    skv = SkvForCausalLM.from_pretrained(tmp_path, kv_retention=0.375).eval()
    sources = (0, 0, 0, 3, 3, 3, 6, 6) if order is None else (0, 1, 1, 3, 3, 3, 3, 3)
    assert tuple(skv.config.sources) == sources
    whole = skv(tokens()).logits
    with rows_run(skv) as rows:
        last = skv(tokens(), logits_to_keep=1).logits
    assert rows == expected_rows(sources, 1)
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-5, rtol=0)


WHOLE = [LENGTH] * LAYERS


@torch.no_grad()
def test_whole_rows_where_they_are_wanted() -> None:
    skv = model(MAPS["half trails"], "eager")
    states = skv(tokens(), output_hidden_states=True).hidden_states
    for name in ("output_hidden_states", "output_attentions"):
        with rows_run(skv) as rows:
            asked = skv(tokens(), logits_to_keep=1, **{name: True})
        assert rows == WHOLE
        setattr(skv.config, name, True)
        with rows_run(skv) as rows:
            configured = skv(tokens(), logits_to_keep=1)
        assert rows == WHOLE
        setattr(skv.config, name, False)
        for out in (asked, configured):
            assert out.logits.shape[1] == 1
            found = out.hidden_states if name == "output_hidden_states" else out.attentions
            assert all(of_layer.shape[-2] == LENGTH for of_layer in found)
            if name == "output_hidden_states":
                torch.testing.assert_close(found, states, atol=0, rtol=0)
    with rows_run(skv) as rows:
        skv(tokens(), logits_to_keep=0)
    assert rows == WHOLE


@pytest.mark.parametrize("chosen", [[3, 20], [20, 23, 21], [23], [-1]], ids=str)
@torch.no_grad()
def test_positions_chosen_by_a_tensor(chosen: list[int]) -> None:
    skv = model(MAPS["half trails"])
    with rows_run(skv) as rows:
        logits = skv(tokens(), logits_to_keep=torch.tensor(chosen)).logits
    assert rows == WHOLE
    torch.testing.assert_close(logits, skv(tokens()).logits[:, chosen], atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_a_loss_is_that_of_whole_rows(training: bool) -> None:
    """The plain forward and its gradients, whatever skips elsewhere; in training also where one row is wanted."""
    skv = model(MAPS["half trails"]).train(training)
    logits = skv(tokens()).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    wanted = torch.autograd.grad(expected, list(skv.parameters()))
    with rows_run(skv) as rows:
        loss = skv(tokens(), labels=tokens()).loss
    assert rows == WHOLE
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, list(skv.parameters())), wanted)
    with rows_run(skv) as rows:
        skv(tokens(), logits_to_keep=1)
    assert rows == (WHOLE if training else expected_rows(MAPS["half trails"], 1))
