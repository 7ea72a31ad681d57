"""Block styles as data: what sets the layers of a family apart from the plain pre-norm block.

Model and configuration read this table and know no block by name. It stands beside the sections, below the model,
because the checks of the ``model`` section need it too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BlockStyle:
    """What a block does differently.

    Attributes:
        post_norms: norms also on what attention and MLP add to the residual stream.
        value_norm: a norm without weight on each head's values.
        score_scale: factor on attention scores; None for 1 / sqrt(head width).
        scaled_embedding: the embedding is multiplied by sqrt(hidden_size).
        local_only: works with ``model.transformer_impl: local`` only.
        needs: keys of the ``model`` section that must have these values.
    """

    post_norms: bool = False
    value_norm: bool = False
    score_scale: float | None = None
    scaled_embedding: bool = False
    local_only: bool = False
    needs: Mapping[str, str | bool | None] = field(default_factory=dict)


BLOCK_STYLES: dict[str, BlockStyle] = {
    "llama": BlockStyle(),
    # Gemma 4's block in its plain form: transformers' `Gemma4TextDecoderLayer` without per-layer inputs, experts and
    # sliding windows.
    "gemma4": BlockStyle(
        post_norms=True,
        value_norm=True,
        score_scale=1.0,
        scaled_embedding=True,
        local_only=True,
        needs={"norm": "rmsnorm", "activation": "geglu", "qk_norm": True, "rope_scaling": None},
    ),
}
