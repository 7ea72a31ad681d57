"""What differs between block styles in the interchange format: names, tensors that only it has, and fields."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from skv_dist.config.model import ModelConfig
from skv_dist.errors import UserError

from ..vocabulary import vocab_size

Map = tuple[int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Constant:
    """A tensor that the format wants and our models do not have: ``value`` everywhere.

    Attributes:
        name: within its layer, or within the model.
    """

    name: str
    value: float
    shape: Callable[[ModelConfig], Shape]


@dataclass(frozen=True)
class StockSharing:
    """A stock architecture that shares K/V with no code of ours.

    Attributes:
        name: as a sentence calls it.
        fields: of ``config.json``, beside those that all exports have. Raises UserError where the architecture cannot
            express the map.
        note: for the README of an exported folder.
    """

    name: str
    fields: Callable[[ModelConfig, Map], dict[str, Any]]
    note: str


@dataclass(frozen=True)
class BlockFormat:
    """One block style in a Hugging Face folder.

    Attributes:
        norms: our norms of a layer in the order of the forward, and what they are called there.
        activation: the only ``model.activation`` that engines are given.
        activation_field: how ``config.json`` says it.
        layer_constants, model_constants: in each layer, and beside the layers.
        stock_sharing: None: a model that shares K/V runs code of ours.
    """

    norms: Mapping[str, str]
    activation: str
    activation_field: tuple[str, str]
    layer_constants: tuple[Constant, ...] = ()
    model_constants: tuple[Constant, ...] = ()
    stock_sharing: StockSharing | None = None


def shared_suffix(sources: Map) -> int:
    """How many layers at the end read the last one before them: all that Gemma 4's architecture can say of a map.

    Raises:
        UserError: it is another map.
    """
    owners = len(set(sources))
    if sources != (*range(owners), *[owners - 1] * (len(sources) - owners)):
        raise UserError(
            f"kv_source_layers {list(sources)} cannot be said in Gemma 4's architecture, where the last layers share "
            "the K/V of the last one before them: use --cached-layers 0 1 ... N"
        )
    return len(sources) - owners


def _gemma4_fields(model: ModelConfig, sources: Map) -> dict[str, Any]:
    """Gemma 4's text model in its plain form: full attention everywhere, per-layer inputs that add nothing, no experts.

    Layers share with the last owner of their own type only, and llama.cpp wants some sliding ones: those before the
    last owner are called sliding, with a window as long as the context.
    """
    shared = shared_suffix(sources)
    before = model.num_layers - shared - 1
    # "proportional" over the whole head is the default; llama.cpp's converter knows no other for full attention.
    full = {"rope_type": "proportional", "partial_rotary_factor": 1.0, "rope_theta": model.rope_theta}
    sliding = {"rope_type": "default", "rope_theta": model.rope_theta}
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "global_head_dim": model.kv_channels,
        "layer_types": ["sliding_attention"] * before + ["full_attention"] * (model.num_layers - before),
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        "sliding_window": model.max_position_embeddings,
        "hidden_size_per_layer_input": 1,
        "vocab_size_per_layer_input": model.vocab_size,
        "use_double_wide_mlp": False,
        "moe_intermediate_size": None,
        "num_kv_shared_layers": shared,
        "final_logit_softcapping": None,
    }


_LLAMA = BlockFormat(
    norms={
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
    },
    activation="swiglu",
    activation_field=("hidden_act", "silu"),
)

_OLMO2 = BlockFormat(
    norms={
        "post_attention_norm": "post_attention_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
    activation="swiglu",
    activation_field=("hidden_act", "silu"),
)

_GEMMA_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}

_GEMMA = BlockFormat(
    norms=_GEMMA_NORMS, activation="geglu", activation_field=("hidden_activation", "gelu_pytorch_tanh")
)

# What Gemma 4 adds to each layer from an embedding of its own is of width 1 and zero here, so that it adds nothing:
# stock transformers 5.23 cannot do without it where layers share K/V (its `_maybe_slice_kv_shared_inputs`).
_GEMMA4 = BlockFormat(
    norms=_GEMMA_NORMS,
    activation="geglu",
    activation_field=("hidden_activation", "gelu_pytorch_tanh"),
    layer_constants=(
        Constant("layer_scalar", 1.0, lambda model: (1,)),  # a factor of the layer's output
        Constant("per_layer_input_gate.weight", 0.0, lambda model: (1, model.hidden_size)),
        Constant("per_layer_projection.weight", 0.0, lambda model: (model.hidden_size, 1)),
        Constant("post_per_layer_input_norm.weight", 0.0, lambda model: (model.hidden_size,)),
    ),
    model_constants=(
        Constant("embed_tokens_per_layer.weight", 0.0, lambda model: (vocab_size(model), model.num_layers)),
        Constant("per_layer_model_projection.weight", 0.0, lambda model: (model.num_layers, model.hidden_size)),
        Constant("per_layer_projection_norm.weight", 0.0, lambda model: (1,)),
    ),
    stock_sharing=StockSharing(
        "Gemma 4",
        _gemma4_fields,
        "llama.cpp: `python -m skv_tools.engines.export.to_gguf LLAMA_CPP FOLDER OUT.gguf` runs its converter.",
    ),
)

BLOCKS = {"llama": _LLAMA, "olmo2": _OLMO2, "gemma": _GEMMA, "gemma4": _GEMMA4}  # by ``model.block``
