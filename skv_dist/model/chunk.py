"""A run of consecutive layers as a function (hidden state, live K/V) -> (hidden state, live K/V)."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module

from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.model.attention import KV
from skv_dist.model.compiled import compile_layers
from skv_dist.model.cross_entropy import vocab_parallel_cross_entropy
from skv_dist.model.distillation import vocab_parallel_distillation
from skv_dist.model.gradients import contiguous_gradient
from skv_dist.model.kv_cache import KvCache
from skv_dist.model.megatron_config import layer_spec, transformer_config, transformer_impl
from skv_dist.model.norm import norm_class
from skv_dist.model.places import Places, places_of
from skv_dist.model.rotary import RotaryTables
from skv_dist.routing import RoutePlan

LiveKV = dict[int, KV]  # by the layer that lends them


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """The vocabulary rounded up so that each tensor-parallel rank holds the same, well-aligned number of rows."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def _leave_as_it_is(_: torch.Tensor) -> None:
    """Megatron's initialization: none. `skv_dist.model.initialize` draws the weights."""


class RoutedChunk(MegatronModule):
    """Some consecutive layers of the routed transformer, with the embedding before the first and the head behind the
    last layer of the model.

    Layers carry their global numbers (``layers.17.mlp...`` is layer 17 on whichever rank it lives), so a parameter has
    one name in every layout.
    """

    def __init__(self, run: RunConfig, numbers: range | None = None) -> None:
        """Build the chunk.

        Args:
            run: the complete run configuration; process groups must exist.
            numbers: global numbers of the layers; all by default.
        """
        config = transformer_config(run)
        super().__init__(config=config)
        model = run.model
        self.numbers = range(model.num_layers) if numbers is None else numbers
        self.vocab_size = run.vocab_size
        self.num_layers = model.num_layers
        self.has_embedding = self.numbers.start == 0
        self.has_head = self.numbers.stop == model.num_layers
        self.recompute_layers = run.train.recompute == "full"
        self.tie_embeddings = model.tie_embeddings
        # The head's weight where it is tied to an embedding on another stage (`skv_dist.parallel.engines.tied`).
        self.tied_weight: torch.Tensor | None = None  # no parameter
        self._model = model
        self._kinds = model.layer_kinds  # once: each forward asks for them in every layer
        self._compiled_loss = run.train.compile

        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group, self.tp_rank, self.tp_size = groups.tp, groups.tp.rank(), groups.tp.size()
        padded = padded_vocab_size(run.vocab_size, model.make_vocab_size_divisible_by, self.tp_size)
        if self.has_embedding:
            self.embedding = VocabParallelEmbedding(
                padded,
                model.hidden_size,
                init_method=_leave_as_it_is,
                config=config,
                tp_group=self.tp_group,
                reduce_scatter_embeddings=config.sequence_parallel,
            )
        spec = layer_spec(model, transformer_impl(run))
        self.layers = torch.nn.ModuleDict(
            {
                str(layer): build_module(spec, config=config, layer_number=layer + 1, pg_collection=groups)
                for layer in self.numbers
            }
        )
        for layer in self.routed_layers():
            layer.apply_style(model)
        if self.has_head:
            self.final_norm = norm_class(model)(config, model.hidden_size, model.norm_eps)
            self.output_layer = ColumnParallelLinear(
                model.hidden_size,
                padded,
                config=config,
                init_method=_leave_as_it_is,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=model.tie_embeddings,
                tp_group=self.tp_group,
            )
        if run.train.recompute == "selective":
            for layer in self.routed_layers():
                layer.self_attention.recompute_core = "core_attn" in run.train.recompute_modules
                layer.recompute_mlp_region = "mlp" in run.train.recompute_modules
        # No buffers, which deepspeed.zero.Init would round.
        self.rotary_tables = RotaryTables(model, config.params_dtype)

    def routed_layers(self) -> list[Any]:
        """The `RoutedLayer` modules, in order."""
        return list(self.layers.values())

    def compile_layers(self) -> None:
        """See `skv_dist.model.compiled.compile_layers`."""
        compile_layers(self.routed_layers(), self._model, self.tp_size)

    def forward(
        self,
        plan: RoutePlan,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        live: LiveKV | None = None,
        cache: KvCache | None = None,
        teacher: torch.Tensor | None = None,
        gather: bool = True,
    ) -> tuple[torch.Tensor, LiveKV]:
        """Run the chunk under a route plan.

        Args:
            plan: the micro-batch's plan, over all layers of the model.
            tokens: int64 [b, s].
            labels: int64 [b, s]; None to get logits.
            documents: int64 [b, s] where attention stops at document boundaries.
            hidden: [s/t, b, h] from the chunk before; None for the first, which embeds ``tokens``.
            live: K/V of earlier layers that this chunk or a later one reads.
            cache: (decoding) K/V of the positions before ``tokens``; takes theirs in. Trailing layers that borrow run
                over the last position alone (`RoutePlan.trailing`).
            teacher: this rank's part of the logits that a teacher gives, [s, b, v].
            gather: (without labels) whether the logits of all tensor-parallel ranks are put together.

        Returns:
            The hidden state [s/t, b, h] and the K/V that later chunks read; where trailing layers ran over the last
            position alone, zeros stand for the others. The last chunk returns no K/V and, in place of the hidden state,
            the loss of each token in nats, float32 [b, s]; with a teacher that loss and KL(teacher || model), float32
            [2, b, s]; without labels the logits, [b, s, vocab_size], and with a cache those of the last position,
            [b, 1, vocab_size]; not gathered, this rank's part of them, [s, b, v].

        Raises:
            UserError: the plan is for another number of layers, or a layer borrows K/V that are not in ``live``.
        """
        if plan.num_layers != self.num_layers:
            raise UserError(f"a route plan over {plan.num_layers} layers met a model of {self.num_layers}")
        positions = tokens.shape[1]
        begin = 0 if cache is None else cache.length
        live = dict(live or {})
        if cache is not None:
            live = {source: cache.extend(source, kv) for source, kv in live.items()}
        with self._dropout_rng():
            if hidden is None:
                hidden = self.embed(tokens)
            hidden = self._run_layers(hidden, live, plan, self.places(tokens, documents, cache), cache)
        if cache is not None:
            cache.advance(positions)
            if self.has_head:
                hidden = hidden[-1:]  # nobody asks for the logits of a prompt, which would fill the memory
            elif len(hidden) < positions:  # the wire has one shape; later stages look at the last position alone
                hidden = torch.nn.functional.pad(hidden, (0, 0, 0, 0, positions - len(hidden), 0))
            live = {source: KV(kv.key[begin:], kv.value[begin:]) for source, kv in live.items()}
        return (self.head(hidden, labels, teacher, gather) if self.has_head else hidden), live

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[b, s] -> what the first layer takes in, [s/t, b, h]."""
        hidden = self.embedding(tokens)
        if (factor := self._embedding_factor(hidden.dtype)) != 1:
            hidden = hidden * factor
        if not self.config.sequence_parallel:
            hidden = hidden.transpose(0, 1).contiguous()  # [b, s, h] -> [s, b, h]; with SP the scatter does it
        if self.training and not hidden.requires_grad and self._learns():
            # Behind a frozen embedding a recomputed layer would see no input with a gradient, and train nothing.
            hidden.requires_grad_()
        return torch.nn.functional.dropout(hidden, self.config.hidden_dropout, self.training)

    def _embedding_factor(self, dtype: torch.dtype) -> float:
        if not self._model.block_style.scaled_embedding:
            return self._model.embedding_scale
        factor = torch.tensor(self._model.hidden_size**0.5, dtype=torch.float32)
        return float(factor.to(dtype))  # rounded, as transformers does

    def _learns(self) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def _dropout_rng(self) -> Any:
        """With sequence parallelism each rank holds other positions, and drops on a stream of its own."""
        drops = self.training and (self.config.hidden_dropout or self.config.attention_dropout)
        if drops and self.config.sequence_parallel:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()

    def places(
        self, tokens: torch.Tensor, documents: torch.Tensor | None = None, cache: KvCache | None = None
    ) -> Places:
        """What this chunk's layers know of positions; arguments as in `forward`."""
        kinds = self._kinds[self.numbers.start : self.numbers.stop]
        return places_of(self._model, kinds, self.rotary_tables, tokens, documents, cache)

    def _run_layers(
        self,
        hidden: torch.Tensor,
        live: LiveKV,
        plan: RoutePlan,
        places: Places,
        cache: KvCache | None,
    ) -> torch.Tensor:
        """Run all layers; ``live`` comes with the K/V of earlier chunks and leaves with those that later ones read.

        Returns:
            The hidden state; with a cache and where trailing layers borrow that of the last position alone, [1, b, h].
        """
        for number in self.numbers:
            if cache is not None and number in plan.trailing and len(hidden) > 1:
                # Nothing is read of these layers but the logits of the last position.
                hidden, places = hidden[-1:], {kind: place.last() for kind, place in places.items()}
            source = plan.source(number)
            borrowed = None
            if source != number:
                if source not in live:
                    raise UserError(
                        f"layer {number} reads the K/V of layer {source}, which is not on this stage "
                        f"(layers {self.numbers.start}..{self.numbers.stop - 1})"
                    )
                borrowed = live[source]
            lends = plan.last_reader[number] > number
            extend = None if cache is None or source != number else partial(cache.extend, number)
            hidden, own = self.run_layer(number, hidden, places, borrowed, lends, extend)
            if own is not None:
                live[number] = KV(contiguous_gradient(own.key), contiguous_gradient(own.value))
            if source != number and plan.last_reader[source] == number:
                del live[source]
        return hidden

    def run_layer(
        self,
        number: int,
        hidden: torch.Tensor,
        places: Places,
        borrowed: KV | None,
        lends: bool,
        extend: Callable[[KV], KV] | None,
    ) -> tuple[torch.Tensor, KV | None]:
        """`RoutedLayer.forward` of one layer, recomputed in backward where the run says so."""
        layer = self.layers[str(number)]
        rotary, mask = places[self._kinds[number]]
        if not (self.recompute_layers and self.training):
            if extend is None:
                return layer(hidden, rotary, mask, borrowed, lends)
            return layer(hidden, rotary, mask, borrowed, lends, extend)

        # Borrowed K/V enter and own K/V leave the region as tensors of its own: what a re-entrant checkpoint holds by
        # closure gets no gradient, silently.
        def region(inputs: torch.Tensor, *kv: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
            out, own = layer(inputs, rotary, mask, KV(*kv) if kv else None, lends)
            return out if own is None else (out, own.key, own.value)

        lent = () if borrowed is None else (borrowed.key, borrowed.value)
        result = tensor_parallel.checkpoint(region, False, hidden, *lent)
        return (result[0], KV(*result[1:])) if lends else (result, None)

    def head(
        self, hidden: torch.Tensor, labels: torch.Tensor | None, teacher: torch.Tensor | None, gather: bool
    ) -> torch.Tensor:
        """[s/t, b, h] -> losses or logits, as `forward` returns them."""
        hidden = self.final_norm(hidden)
        if self._model.logit_divisor != 1:
            hidden = hidden / self._model.logit_divisor  # as far as logits are concerned; they are many more numbers
        weight = self.embedding.weight if self.tie_embeddings and self.has_embedding else self.tied_weight
        logits, _ = self.output_layer(hidden, weight=weight)  # [s, b, v]
        if self._model.logit_cap is not None:
            logits = self._model.logit_cap * torch.tanh(logits / self._model.logit_cap)
        if labels is None and not gather:
            return logits
        if labels is None:
            whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
            return whole[..., : self.vocab_size].transpose(0, 1)  # [s, b, V] -> [b, s, V]
        group = self.tp_group if self.tp_size > 1 else None
        labels = labels.transpose(0, 1).contiguous()
        place = (self.vocab_size, self.tp_rank, group, self._compiled_loss)
        if teacher is None:
            losses = vocab_parallel_cross_entropy(logits, labels, *place)
        else:
            losses = vocab_parallel_distillation(logits, teacher, labels, *place)
        return losses.transpose(-1, -2)  # [..., s, b] -> [..., b, s]
