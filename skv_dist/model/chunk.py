"""A run of consecutive layers on one rank, with embedding and head where they belong."""

import contextlib
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.utils import get_tensor_model_parallel_group_if_none

from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.model.attention import KV
from skv_dist.model.cross_entropy import vocab_parallel_cross_entropy
from skv_dist.model.documents import document_mask
from skv_dist.model.gradients import contiguous_gradient
from skv_dist.model.megatron_config import layer_spec, norm_class, transformer_config, transformer_impl
from skv_dist.model.rotary import inverse_frequencies, rotary_table
from skv_dist.parallel.wire.packing import pack, unpack
from skv_dist.routing import RoutePlan


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """The vocabulary rounded up so that each tensor-parallel rank holds the same, well-aligned number of rows."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def _nothing(_: torch.Tensor) -> None:
    """Weights are drawn by `skv_dist.model.initialize`."""


class RoutedChunk(MegatronModule):
    """Layers ``first_layer <= l < last_layer`` of the routed transformer.

    Layers carry their global numbers (``layers.17.mlp...`` is layer 17 on whichever rank it lives), so a parameter has
    one name in every layout.
    """

    def __init__(self, run: RunConfig, vocab_size: int, first_layer: int = 0, last_layer: int | None = None) -> None:
        """Build the chunk.

        Args:
            run: the run configuration; process groups must exist.
            vocab_size: size without padding.
            first_layer, last_layer: half-open range of global layer numbers; all by default.
        """
        config = transformer_config(run)
        super().__init__(config=config)
        model = run.model
        self.vocab_size = vocab_size
        self.num_layers = model.num_layers
        self.first_layer = first_layer
        self.last_layer = model.num_layers if last_layer is None else last_layer
        self.has_embedding = self.first_layer == 0
        self.has_head = self.last_layer == model.num_layers
        self.recompute_layers = run.train.recompute == "full"
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage: int | None = None  # which of its rank's chunks this is; set where there are several
        self.tie_embeddings = model.tie_embeddings
        # The head's weight where it is tied to an embedding on another stage (skv_dist.parallel.engines.tied). No parameter.
        self.tied_weight: torch.Tensor | None = None
        self._received: torch.Tensor | None = None
        self._compiled_loss = run.train.compile

        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group, self.tp_rank, self.tp_size = groups.tp, groups.tp.rank(), groups.tp.size()
        padded = padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, self.tp_size)
        if self.has_embedding:
            self.embedding = VocabParallelEmbedding(
                padded,
                model.hidden_size,
                init_method=_nothing,
                config=config,
                tp_group=self.tp_group,
                reduce_scatter_embeddings=config.sequence_parallel,
            )
        spec = layer_spec(model, transformer_impl(run))
        self.layers = torch.nn.ModuleDict(
            {
                str(layer): build_module(spec, config=config, layer_number=layer + 1, pg_collection=groups)
                for layer in range(self.first_layer, self.last_layer)
            }
        )
        layer: Any
        if model.block == "gemma4":
            for layer in self.layers.values():
                layer.become_gemma4(model.norm_eps)
        if self.has_head:
            self.final_norm = norm_class(model)(config, model.hidden_size, model.norm_eps)
            self.output_layer = ColumnParallelLinear(
                model.hidden_size,
                padded,
                config=config,
                init_method=_nothing,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=model.tie_embeddings,
                tp_group=self.tp_group,
            )
        if run.train.recompute == "selective":
            for layer in self.layers.values():
                layer.self_attention.recompute_core = "core_attn" in run.train.recompute_modules
                layer.recompute_mlp_region = "mlp" in run.train.recompute_modules
        # Computed in fp32 at first use; no buffer, which deepspeed.zero.Init would round.
        self._table: torch.Tensor | None = None
        self._model = model

    def set_input_tensor(self, received: list[torch.Tensor | None]) -> None:
        """Megatron's schedules leave here what the stage before sent; see `take_input`."""
        (self._received,) = received

    def take_input(self) -> torch.Tensor | None:
        """What the stage before sent for the next forward, to be passed to it. Nothing is left behind."""
        received, self._received = self._received, None
        return received

    def compile_layers(self) -> None:
        """Compile each layer on its own: the graph of a step changes with every route table, a layer's does not."""
        # Megatron warns of a deprecated argument inside its own row-parallel linear, which would cut the graph.
        # What the function returns never changes.
        torch.compiler.assume_constant_result(get_tensor_model_parallel_group_if_none)
        # One variant each: own K/V, borrowed on this stage, or from another; lent or not; training, in a region to be
        # recomputed, or evaluating. Another route table needs no other variants.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        layer: Any
        for layer in self.layers.values():
            if self.tp_size > 1:
                self._keep_collectives_eager(layer)
            layer.compiled_swiglu = self._model.activation == "swiglu"
            layer.forward = torch.compile(layer.forward, dynamic=False)

    def _keep_collectives_eager(self, layer: Any) -> None:
        """Leave to Megatron what talks to other ranks: it waits for its collectives by handles, which the compiler does
        not follow. Traced, they give wrong gradients without an error (torch 2.11) or fail (2.13).
        """
        for module in layer.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                module.forward = torch.compiler.disable(module.forward)
        if self._model.num_kv_heads < self.tp_size:  # projections are gathered before they are split into heads
            attention = layer.self_attention
            attention.get_query_key_value_tensors = torch.compiler.disable(attention.get_query_key_value_tensors)

    def forward(
        self,
        plan: RoutePlan,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        received: torch.Tensor | None = None,
        width: int | None = None,
    ) -> torch.Tensor:
        """Run the chunk under a route plan.

        Args:
            plan: the micro-batch's plan, over all layers of the model.
            tokens: int64 [b, s].
            labels: int64 [b, s]; None to get logits.
            documents: int64 [b, s] where attention stops at document boundaries.
            received: what the chunk before returned, [s/t, b, width]; None for the first.
            width: columns to pad the result to, where a chunk follows; None: as many as it needs.

        Returns:
            On the last chunk the loss of each token in nats, float32 [b, s]; without labels the logits,
            [b, s, vocab_size]. On the others the hidden state and the K/V that later chunks read, packed
            (`skv_dist.parallel.wire.packing`): [s/t, b, width].

        Raises:
            UserError: the plan is for another number of layers, or names a source that is not on this chunk.
        """
        if plan.num_layers != self.num_layers:
            raise UserError(f"a route plan over {plan.num_layers} layers met a model of {self.num_layers}")
        mask = None if documents is None else document_mask(documents)
        with self._dropout_rng():
            live: dict[int, KV] = {}
            if received is None:
                hidden = self._embed(tokens)
            else:
                hidden, live = self._unpack(received, plan, tokens.shape[1])
            hidden = self._run_layers(hidden, live, plan, self._rotary(tokens), mask)
        if not self.has_head:
            return pack(hidden, live, plan.live_after(self.last_layer - 1), width)
        return self._head(hidden, labels)

    def _unpack(self, received: torch.Tensor, plan: RoutePlan, length: int) -> tuple[torch.Tensor, dict[int, KV]]:
        sources = plan.live_after(self.first_layer - 1)
        heads = max(1, self._model.num_kv_heads // self.tp_size)
        return unpack(received, self._model.hidden_size, sources, heads, self._model.kv_channels, length)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        if self._model.block == "gemma4":
            scale = torch.tensor(self._model.hidden_size**0.5, dtype=hidden.dtype)  # rounded, as transformers does
            hidden = hidden * scale.item()
        if not self.config.sequence_parallel:
            hidden = hidden.transpose(0, 1).contiguous()  # [b, s, h] -> [s, b, h]; with SP the scatter does it
        return torch.nn.functional.dropout(hidden, self.config.hidden_dropout, self.training)

    def _dropout_rng(self) -> Any:
        """With sequence parallelism each rank holds other positions, and drops on a stream of its own."""
        drops = self.training and (self.config.hidden_dropout or self.config.attention_dropout)
        if drops and self.config.sequence_parallel:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()

    def _rotary(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        if self._table is None or self._table.shape[1] < length or self._table.device != tokens.device:
            inverse = inverse_frequencies(self._model).to(tokens.device)
            self._table = rotary_table(inverse, length, self.config.params_dtype)
        return self._table[:, :length]

    def _run_layers(
        self, hidden: torch.Tensor, live: dict[int, KV], plan: RoutePlan, rotary: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        """Run all layers; ``live`` comes with the K/V of earlier chunks and leaves with those that later ones read."""
        for number in range(self.first_layer, self.last_layer):
            source = plan.source(number)
            borrowed = None
            if source != number:
                if source not in live:
                    raise UserError(
                        f"layer {number} reads the K/V of layer {source}, which is not on this stage "
                        f"(layers {self.first_layer}..{self.last_layer - 1})"
                    )
                borrowed = live[source]
            keep = plan.last_reader[number] > number
            hidden, own = self._run_layer(number, hidden, rotary, mask, borrowed, keep)
            if own is not None:
                live[number] = KV(contiguous_gradient(own.key), contiguous_gradient(own.value))
            if source != number and plan.last_reader[source] == number:
                del live[source]
        return hidden

    def _run_layer(
        self, number: int, hidden: torch.Tensor, rotary: torch.Tensor, mask: Any, borrowed: KV | None, keep: bool
    ) -> tuple[torch.Tensor, KV | None]:
        layer = self.layers[str(number)]
        if not (self.recompute_layers and self.training):
            return layer(hidden, rotary, mask, borrowed, keep)

        # Borrowed K/V enter and own K/V leave the region as tensors of its own: what a re-entrant checkpoint holds by
        # closure gets no gradient, silently.
        def region(inputs: torch.Tensor, *kv: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
            out, own = layer(inputs, rotary, mask, KV(*kv) if kv else None, keep)
            return out if own is None else (out, own.key, own.value)

        lent = () if borrowed is None else (borrowed.key, borrowed.value)
        result = tensor_parallel.checkpoint(region, False, hidden, *lent)
        return (result[0], KV(*result[1:])) if keep else (result, None)

    def _head(self, hidden: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        hidden = self.final_norm(hidden)
        weight = self.embedding.weight if self.tie_embeddings and self.has_embedding else self.tied_weight
        logits, _ = self.output_layer(hidden, weight=weight)  # [s, b, v]
        if labels is None:
            whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
            return whole[..., : self.vocab_size].transpose(0, 1)
        group = self.tp_group if self.tp_size > 1 else None
        losses = vocab_parallel_cross_entropy(
            logits, labels.transpose(0, 1).contiguous(), self.vocab_size, self.tp_rank, group, self._compiled_loss
        )
        return losses.transpose(0, 1)
