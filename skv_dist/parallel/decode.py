"""Decoding with a K/V cache of the owners alone, in any layout without sequence parallelism."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.model.kv_cache import KvCache
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.wire.communicator import WireCommunicator
from skv_dist.parallel.wire.port import ChunkPort
from skv_dist.parallel.wire.widths import wire_widths
from skv_dist.routing import RoutePlan

Choose = Callable[[torch.Tensor], torch.Tensor]


def check_decodable(run: RunConfig) -> None:
    """Whether `Decoder` can run in this layout.

    Raises:
        UserError: it cannot, naming the key.
    """
    parallel = run.parallel
    if parallel.sequence_parallel:
        raise UserError(
            "decoding with a K/V cache and parallel.sequence_parallel: true do not work together: set "
            "parallel.sequence_parallel=false"
        )
    if parallel.virtual_pipeline > 1:
        raise UserError(
            f"decoding with a K/V cache and parallel.virtual_pipeline {parallel.virtual_pipeline} do not work "
            "together: set parallel.virtual_pipeline=1"
        )


class Decoder:
    """Continues prompts under one sharing map.

    Args:
        plan: the map. Its owners alone keep a cache.

    Attributes:
        cache_bytes_per_token: of this rank, measured at the last answers.
    """

    def __init__(self, engine: Engine, run: RunConfig, plan: RoutePlan) -> None:
        check_decodable(run)
        self._engine, self._run, self._plan = engine, run, plan
        self._widths = wire_widths(run, [plan])
        (chunk,) = engine.model.routed_chunks()
        self._port = ChunkPort(chunk, 0, 1)
        self._device = engine.model.device
        self.cache_bytes_per_token = 0

    @torch.no_grad()
    def continue_prompts(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, ends: frozenset[int], choose: Choose, pad: int
    ) -> list[list[int]]:
        """The answers to some prompts. Collective over this replica's ranks, which all pass the same.

        Args:
            prompts: token ids, none empty.
            new_tokens: largest number of tokens in an answer.
            ends: tokens that end an answer, and are no part of it.
            choose: logits float32 [b, V] -> int64 [b]; called on the last stage.
            pad: a token for the places before short prompts and behind answers.
        """
        self._engine.model.eval()
        # What is compiled is so for one length of sequence; here each token is another.
        stance = torch.compiler.set_stance("force_eager") if self._run.train.compile else contextlib.nullcontext()
        with stance:
            return self._continue(prompts, new_tokens, ends, choose, pad)

    def _continue(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, ends: frozenset[int], choose: Choose, pad: int
    ) -> list[list[int]]:
        longest = max(map(len, prompts))
        begins = torch.tensor([longest - len(prompt) for prompt in prompts], device=self._device)
        tokens = torch.full((len(prompts), longest), pad, device=self._device)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(list(prompt), device=self._device)
        cache = KvCache(longest + new_tokens, begins)
        answers: list[list[int]] = [[] for _ in prompts]
        going_on = set(range(len(prompts)))
        for _ in range(new_tokens):
            chosen = self._next(tokens, cache, choose)
            for row, token in enumerate(chosen.tolist()):
                if row in going_on and token in ends:
                    going_on.discard(row)
                elif row in going_on:
                    answers[row].append(token)
            if not going_on:
                break
            tokens = chosen[:, None]
        self.cache_bytes_per_token = cache.bytes_per_token()
        return answers

    def _next(self, tokens: torch.Tensor, cache: KvCache, choose: Choose) -> torch.Tensor:
        """One forward over ``tokens`` [b, n]; the chosen next tokens, int64 [b], the same on all ranks."""
        logits = self._logits(tokens, cache)
        chosen = torch.zeros(len(tokens), dtype=torch.int64, device=self._device)
        if logits is not None:
            chosen = choose(logits[:, -1].float()).to(self._device)
        # Ranks of one tensor-parallel group could choose apart where two logits are equal but for rounding.
        tensor_group = parallel_state.get_tensor_model_parallel_group()
        pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        last = dist.get_global_rank(pipeline_group, pipeline_group.size() - 1)
        if tensor_group.size() > 1:
            dist.broadcast(chosen, dist.get_global_rank(tensor_group, 0), group=tensor_group)
        if pipeline_group.size() > 1:
            dist.broadcast(chosen, last, group=pipeline_group)
        return chosen

    def _logits(self, tokens: torch.Tensor, cache: KvCache) -> torch.Tensor | None:
        """[b, 1, V] on the last stage, elsewhere None."""

        def forward_step(waiting: Iterator[Any], port: ChunkPort) -> tuple[torch.Tensor, object]:
            out = self._engine.forward(
                0, self._plan, tokens, received=port.take_input(), width=self._widths.padded, cache=cache
            )
            return out, lambda logits, non_loss_data: logits

        stage = parallel_state.get_pipeline_model_parallel_rank()
        communicator = WireCommunicator(
            parallel_state.get_pipeline_model_parallel_group(),
            self._port.config,
            incoming=self._widths.behind(stage - 1),
            outgoing=self._widths.behind(stage),
        )
        collected = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([tokens]),
            model=self._port,
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=communicator,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        return collected[0] if collected else None


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Greedy: [b, V] -> [b]."""
    return logits.argmax(-1)
