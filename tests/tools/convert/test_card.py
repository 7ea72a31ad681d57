"""What the README of an exported folder says of prompts."""

from pathlib import Path

import pytest
from skv_tools.convert import card as cards
from skv_tools.convert.to_hf import Export


@pytest.mark.parametrize(
    ("sources", "adaptive", "said"),
    [
        ((0, 1, 2, 3, 3, 3, 2, 1), False, "The last 4 of 8 layers all borrow and add nothing to the cache"),
        ((0, 0, 0, 0, 0, 0, 0, 0), False, "through them but for its last token, which saves up to 88% of"),
        ((0, 1, 2, 3, 3, 3, 2, 1), True, "Under this map the last 4 of 8 layers all borrow"),
        ((0, 0, 2, 2, 4, 4, 6, 6), False, "The last layer borrows and adds nothing to the cache"),
        ((0, 0, 2, 2, 4, 4, 6, 6), False, "through it but for its last token, which saves up to 12% of"),
        ((0, 0, 2, 2, 4, 4, 6, 7), False, None),
        (tuple(range(8)), True, None),
    ],
)
def test_layers_that_trail(checkpoint: Path, sources: tuple[int, ...], adaptive: bool, said: str | None) -> None:
    config = {"model_type": "skv", "architectures": ["SkvForCausalLM"], "head_dim": 16}
    text = cards.model_card(checkpoint, "out", config, Export(sources, adaptive), [], chats=False)
    assert ("the time to the first token" in text) == (said is not None)
    assert said is None or said in text


def test_stock_models_leave_it_to_the_engine(checkpoint: Path) -> None:
    """Gemma 4's block needs no code of ours, and transformers runs all of its layers over a prompt."""
    config = {"model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"], "head_dim": 16}
    text = cards.model_card(checkpoint, "out", config, Export((0, 1, 2, 2)), [], chats=False)
    assert "the time to the first token" not in text
