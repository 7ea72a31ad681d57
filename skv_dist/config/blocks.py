"""Block styles as data: what sets the layers of a family apart from the plain pre-norm block.

Model and configuration read this table and know no block by name. It stands beside the sections, below the model,
because the checks of the ``model`` section need it too.

A block is what the layers of a family always have in common. What two models of one family may differ in (biases,
windows, multipliers) are keys of the ``model`` section: `OPTIONS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

OPTIONS = (
    "biases",
    "no_rope_layers",
    "sliding_window",
    "sliding_layers",
    "sliding_rope_theta",
    "embedding_scale",
    "residual_scale",
    "score_scale",
    "logit_divisor",
    "score_cap",
    "logit_cap",
)
"""Keys of the ``model`` section whose defaults are the plain block. Engines that know the plain block only look here
for what they would leave out."""


@dataclass(frozen=True)
class BlockStyle:
    """What a block does differently.

    Attributes:
        norms: where attention and MLP are normed: what goes in (``before``), what is added to the residual stream
            (``behind``), or ``both``.
        qk_norm_over: what ``model.qk_norm`` norms: each ``head``, or the queries (the keys) of ``all_heads`` together.
        norm_offset: what is added to the weights of norms.
        value_norm: a norm without weight on each head's values.
        score_scale: factor on attention scores; None for 1 / sqrt(head width).
        scaled_embedding: the embedding is multiplied by sqrt(hidden_size).
        local_only: works with ``model.transformer_impl: local`` only.
        needs: keys of the ``model`` section that must have these values.
        lacks: those of `OPTIONS` that must keep their defaults.
    """

    norms: Literal["before", "behind", "both"] = "before"
    qk_norm_over: Literal["head", "all_heads"] = "head"
    norm_offset: float = 0.0
    value_norm: bool = False
    score_scale: float | None = None
    scaled_embedding: bool = False
    local_only: bool = False
    needs: Mapping[str, str | bool | None] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()

    @property
    def norms_before(self) -> bool:
        return self.norms != "behind"

    @property
    def norms_behind(self) -> bool:
        return self.norms != "before"


BLOCK_STYLES: dict[str, BlockStyle] = {
    # With the keys of OPTIONS also Qwen2, Qwen3, Mistral, SmolLM3, Granite and Phi-3.
    "llama": BlockStyle(),
    # OLMo 2 (arXiv 2501.00656): transformers' `Olmo2DecoderLayer`.
    "olmo2": BlockStyle(
        norms="behind",
        qk_norm_over="all_heads",
        local_only=True,
        needs={"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True},
    ),
    # Gemma 2 (arXiv 2408.00118) and, with qk_norm, Gemma 3: transformers' `Gemma2DecoderLayer`, `Gemma3DecoderLayer`.
    "gemma": BlockStyle(
        norms="both",
        norm_offset=1.0,
        scaled_embedding=True,
        local_only=True,
        needs={"norm": "rmsnorm", "activation": "geglu"},
        lacks=("embedding_scale",),
    ),
    # Gemma 4's block in its plain form: transformers' `Gemma4TextDecoderLayer` without per-layer inputs, experts and
    # sliding windows.
    "gemma4": BlockStyle(
        norms="both",
        value_norm=True,
        score_scale=1.0,
        scaled_embedding=True,
        local_only=True,
        needs={"norm": "rmsnorm", "activation": "geglu", "qk_norm": True, "rope_scaling": None},
        lacks=OPTIONS,
    ),
}
