"""Layers at the end that all borrow run over the positions alone whose logits are wanted, and nothing else changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from skv_tools.engines.models.modeling_skv import SkvConfig, SkvForCausalLM
from transformers import DynamicCache, StaticCache

LAYERS, LENGTH = 8, 24
MAPS = {
    "a quarter trails": (0, 1, 2, 3, 4, 5, 5, 5),
    "half trails": (0, 1, 2, 3, 3, 3, 2, 1),
    "three quarters trail": (0, 1, 1, 0, 1, 1, 1, 0),
    "one owner": (0,) * LAYERS,
    "none trails": (0, 0, 2, 2, 4, 4, 6, 7),
}


def model(sources: tuple[int, ...], attention: str = "sdpa") -> Any:
    torch.manual_seed(3)
    config = SkvConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.2,  # so that attention is sharp
        qk_norm=True,
        kv_source_layers=list(sources),
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation=attention,
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
    return torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(5))


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


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("sources", MAPS.values(), ids=MAPS)
@torch.no_grad()
def test_generation_is_the_same(
    sources: tuple[int, ...], implementation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    skv = model(sources)
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :9] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": implementation, "pad_token_id": 0}
    with rows_run(skv) as rows:
        skipping = skv.generate(tokens(), attention_mask=mask, **settings)
    assert rows[:LAYERS] == expected_rows(sources, 1)
    monkeypatch.setattr(type(skv.model), "_can_narrow", lambda *_: False)
    with rows_run(skv) as rows:
        assert torch.equal(skv.generate(tokens(), attention_mask=mask, **settings), skipping)
    assert rows[:LAYERS] == [LENGTH] * LAYERS


def test_whole_rows_where_they_are_wanted() -> None:
    skv = model(MAPS["half trails"])
    ids = tokens()
    for given in ({"output_hidden_states": True}, {"output_attentions": True}, {"labels": ids}, {"logits_to_keep": 0}):
        with rows_run(skv) as rows:
            skv(ids, **({"logits_to_keep": 1} if "labels" not in given else {}) | given)
        assert rows == [LENGTH] * LAYERS
    with rows_run(skv.train()) as rows:
        skv(ids, logits_to_keep=1)
    assert rows == [LENGTH] * LAYERS
    chosen = torch.tensor([3, 20])
    torch.testing.assert_close(skv.eval()(ids, logits_to_keep=chosen).logits, skv(ids).logits[:, chosen])
