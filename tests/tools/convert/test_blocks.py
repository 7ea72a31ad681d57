"""Block styles in the interchange format."""

import pytest
from skv_tools.convert.blocks import BLOCKS, shared_suffix
from skv_tools.convert.hf_config import check_exportable, map_of
from skv_tools.convert.names import Fusion, entries

from skv_dist.config.blocks import BLOCK_STYLES
from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError

SHAPE = {"num_layers": 3, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 2, "num_kv_heads": 1}
CHANGES = {
    "llama": {},
    "olmo2": {"qk_norm": True},
    "gemma": {"activation": "geglu"},
    "gemma4": {"activation": "geglu", "qk_norm": True},
}


def model(block: str) -> ModelConfig:
    return ModelConfig.model_validate({**SHAPE, "block": block, "vocab_size": 20, **CHANGES[block]})


def test_every_block_style_has_a_format() -> None:
    assert BLOCKS.keys() == BLOCK_STYLES.keys() == CHANGES.keys()


@pytest.mark.parametrize("block", BLOCKS)
def test_names_are_told_apart_and_constants_are_not_ours(block: str) -> None:
    listed = list(entries(model(block)))
    ours = [entry.ours for entry in listed if entry.ours is not None]
    theirs = [name for entry in listed for name in entry.theirs]
    assert len(set(ours)) == len(ours)
    assert len(set(theirs)) == len(theirs)
    assert {len(entry.theirs) for entry in listed if entry.fusion is Fusion.NONE} == {1}
    constants = {name for entry in listed if entry.ours is None for name in entry.theirs}
    assert len(constants) == 3 * len(BLOCKS[block].layer_constants) + len(BLOCKS[block].model_constants)
    check_exportable(model(block))


def test_an_activation_that_engines_are_not_given_is_refused() -> None:
    with pytest.raises(UserError, match="'gelu', but engines are given 'swiglu' only"):
        check_exportable(model("llama").model_copy(update={"activation": "gelu"}))


def test_gemma4_says_only_how_many_layers_share_at_the_end() -> None:
    fields = BLOCKS["gemma4"].stock_sharing
    assert fields is not None
    assert shared_suffix((0, 1, 1)) == 1
    config = fields.fields(model("gemma4"), (0, 1, 1))
    assert map_of({**config, "num_hidden_layers": 3}) == (0, 1, 1)
    with pytest.raises(UserError, match="--cached-layers 0 1"):
        shared_suffix((0, 0, 2))
