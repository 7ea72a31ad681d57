"""A decoder whose layers may share K/V, of vLLM's own layers (run with vLLM 0.32). `vllm_plugin` registers it.

Layer ``l`` attends to the K/V of layer ``kv_source_layers[l] <= l``. vLLM allots a cache to a layer that is its own
source; any other has no key or value projection, and reads its source's cache.

Axes: tokens of all sequences lie in one row, s; h hidden, n heads on this rank, g key/value heads on this rank,
d a head's width.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.distributed.utils import get_pp_indices
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backends.utils import KVSharingFastPrefillMetadata


def _check_stages(sources: list[int], stages: int) -> None:
    """Raises:
    ValueError: a layer and its source are in different pipeline stages of vLLM, each of which has caches of its own."""
    for rank in range(stages):
        first, end = get_pp_indices(len(sources), rank, stages)
        for layer in range(first, end):
            if sources[layer] < first:
                raise ValueError(
                    f"layer {layer} reads the K/V of layer {sources[layer]}, which --pipeline-parallel-size {stages} "
                    f"puts in an earlier stage (this one has layers {first} to {end - 1}): use "
                    "--tensor-parallel-size instead, or set VLLM_PP_LAYER_PARTITION so that no stage reads from another"
                )


def _check_block(config: Any) -> None:
    """Raises:
    ValueError: the layers are not Llama's or Qwen3's, which alone are written down here."""
    if getattr(config, "block", None):
        name, value = next(iter(config.block.items()))
        raise ValueError(f"block: {name} is {value!r}, which this plugin does not carry: use transformers")
    if config.rope_parameters["rope_type"] not in ("default", "llama3"):
        raise ValueError(
            f"rope_type is {config.rope_parameters['rope_type']!r}, but this plugin was run with 'default' and "
            "'llama3' only: use transformers"
        )


def _skips(vllm_config: VllmConfig) -> bool:
    """Whether trailing sharers run over the rows alone whose logits are wanted (``--kv-sharing-fast-prefill``)."""
    return vllm_config.cache_config.kv_sharing_fast_prefill


def _check_skipping(vllm_config: VllmConfig, stages: int) -> None:
    """Raises:
    ValueError: ``--kv-sharing-fast-prefill`` where it would be wrong, or was never seen to be right."""
    if _skips(vllm_config) and stages > 1:
        raise ValueError(
            f"--kv-sharing-fast-prefill and --pipeline-parallel-size {stages} do not work together: layers at the end "
            "of each stage would skip the prompt, which the next stage needs"
        )
    if _skips(vllm_config) and vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        raise ValueError(
            "--kv-sharing-fast-prefill was not tried with CUDA graphs for this model: add --enforce-eager, or leave it "
            "out"
        )


class SkvAttention(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quantization = vllm_config.model_config.hf_config, vllm_config.quant_config
        index = extract_layer_index(prefix)
        source = config.kv_source_layers[index]
        ranks = get_tensor_model_parallel_world_size()
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        if heads % ranks or max(groups, ranks) % min(groups, ranks):
            raise ValueError(f"--tensor-parallel-size {ranks} must divide {heads} heads, and {groups} K/V heads evenly")
        self.head_dim = config.head_dim
        self.query_width = heads // ranks * self.head_dim
        self.kv_width = max(1, groups // ranks) * self.head_dim
        self.owns_cache = source == index
        if self.owns_cache:
            self.qkv_proj = QKVParallelLinear(
                config.hidden_size,
                self.head_dim,
                heads,
                groups,
                bias=False,
                quant_config=quantization,
                prefix=f"{prefix}.qkv_proj",
            )
        else:
            self.q_proj = ColumnParallelLinear(
                config.hidden_size,
                heads * self.head_dim,
                bias=False,
                quant_config=quantization,
                prefix=f"{prefix}.q_proj",
            )
        self.o_proj = RowParallelLinear(
            heads * self.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quantization,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm and self.owns_cache else None
        self.rotary_emb = get_rope(
            self.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        layers = prefix.split(".layers.")[0]
        self.attn = Attention(
            heads // ranks,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=max(1, groups // ranks),
            cache_config=vllm_config.cache_config,
            quant_config=quantization,
            kv_sharing_target_layer_name=None if self.owns_cache else f"{layers}.layers.{source}.self_attn.attn",
            prefix=f"{prefix}.attn",
        )

    def _norm(self, norm: RMSNorm | None, states: torch.Tensor) -> torch.Tensor:
        """[s, n * d] -> the same shape"""
        return states if norm is None else norm(states.unflatten(-1, (-1, self.head_dim))).flatten(-2)

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """positions [s], hidden [s, h] -> [s, h]"""
        if self.owns_cache:
            qkv, _ = self.qkv_proj(hidden)
            query, key, value = qkv.split([self.query_width, self.kv_width, self.kv_width], dim=-1)
            query, key = self.rotary_emb(positions, self._norm(self.q_norm, query), self._norm(self.k_norm, key))
            attended = self.attn(query, key, value)
        else:
            query, _ = self.q_proj(hidden)
            query, _ = self.rotary_emb(positions, self._norm(self.q_norm, query), None)
            attended = self.attn(query, None, None)
        return self.o_proj(attended)[0]


class SkvMLP(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quantization = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quantization,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quantization,
            prefix=f"{prefix}.down_proj",
        )
        self.activation = SiluAndMul()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(hidden)[0]))[0]


class SkvDecoderLayer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = SkvAttention(vllm_config, f"{prefix}.self_attn")
        self.mlp = SkvMLP(vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [s, h] is what the next norm adds to ``residual`` [s, h]; returns both."""
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions, hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


@support_torch_compile(enable_if=_skips)
class SkvLayers(nn.Module):
    """Consecutive layers, compiled as a graph of their own where the layers behind them get other rows."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layers: Sequence[SkvDecoderLayer]) -> None:
        super().__init__()
        self.layers = layers

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `SkvDecoderLayer.forward`."""
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return hidden, residual


@support_torch_compile(enable_if=lambda vllm_config: not _skips(vllm_config))
class SkvModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config, stage = vllm_config.model_config.hf_config, get_pp_group()
        if stage.is_first_rank or (config.tie_word_embeddings and stage.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )
        else:
            self.embed_tokens = PPMissingLayer()
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: SkvDecoderLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if stage.is_last_rank else PPMissingLayer()
        self.skips = _skips(vllm_config)
        if self.skips:
            trailing = max(config.kv_source_layers) + 1  # the first of the layers at the end that all borrow
            with set_model_tag("before_trailing"):
                self.before = SkvLayers(vllm_config=vllm_config, prefix=prefix, layers=self.layers[:trailing])
            with set_model_tag("trailing"):
                self.trailing = SkvLayers(vllm_config=vllm_config, prefix=prefix, layers=self.layers[trailing:])
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """input_ids [s] -> [s, h], normed, or what the next stage goes on with."""
        if get_pp_group().is_first_rank:
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            assert intermediate_tensors is not None
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        if self.skips:
            return self._skipping(positions, hidden)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden, residual = layer(positions, hidden, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})
        return self.norm(hidden, residual)[0]

    def _skipping(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Embedded tokens [s, h] -> [s, h], normed; of rows whose logits nobody wants, zeros."""
        before, residual = self.before(positions, hidden, None)
        wanted = self._wanted_rows()
        if wanted is None:
            return self.norm(*self.trailing(positions, before, residual))[0]
        last, residual = self.trailing(positions[wanted], before[wanted], residual[wanted])
        return torch.zeros_like(before).index_copy(0, wanted, self.norm(last, residual)[0])

    def _wanted_rows(self) -> torch.Tensor | None:
        """int64 [n], the rows that vLLM has cut the attention of trailing layers down to; None: all."""
        batch = get_forward_context().attn_metadata
        if not isinstance(batch, dict):  # as where vLLM measures the memory that the model takes
            return None
        metadata = batch[self.layers[-1].self_attn.attn.layer_name]
        if not isinstance(metadata, KVSharingFastPrefillMetadata) or metadata.logits_indices_padded is None:
            return None
        return metadata.logits_indices_padded[: metadata.num_logits_indices].long()


class SkvForCausalLM(nn.Module, SupportsPP):
    # what a quantized checkpoint's per-layer settings are looked up by
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        _check_block(config)
        config.resolve_sharing()  # of the exported folder's own config class: checks the map, applies kv_retention
        _check_stages(config.kv_source_layers, get_pp_group().world_size)
        _check_skipping(vllm_config, get_pp_group().world_size)
        self.model = SkvModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[s, h] -> [s, vocabulary]"""
        return self.logits_processor(self.lm_head, hidden_states)

    def _unused(self, name: str) -> bool:
        """Whether this process has no use for a weight: another stage's, a tied head, or K/V that the map replaces."""
        if is_pp_missing_parameter(name, self) or (self.config.tie_word_embeddings and name.startswith("lm_head.")):
            return True
        if not any(part in name for part in (".k_proj.", ".v_proj.", ".k_norm.")):
            return False
        index = extract_layer_index(name)
        return self.config.kv_source_layers[index] != index

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Returns the names of the parameters that were filled; vLLM compares them with all."""
        joined: dict[str, tuple[str, str | int]] = {f".{part}_proj": (".qkv_proj", part) for part in "qkv"}
        joined |= {".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}
        parameters, filled = dict(self.named_parameters()), set()
        for name, weight in weights:
            if self._unused(name):
                continue
            target, shard = name, None
            for part, (whole, piece) in joined.items():
                if part in name and name.replace(part, whole) in parameters:  # not the q_proj of a layer that shares
                    target, shard = name.replace(part, whole), piece
            if target not in parameters:
                raise ValueError(f"the folder holds a weight {name} that this model has no place for")
            parameter = parameters[target]
            load = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, weight, *(() if shard is None else (shard,)))
            filled.add(target)
        return filled
