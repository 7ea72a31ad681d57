"""Decoding with a K/V cache of the owners alone, in any layout."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.model.kv_cache import KvCache
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.forward import Forward
from skv_dist.routing import RoutePlan

Choose = Callable[[torch.Tensor], torch.Tensor]


class Decoder:
    """Continues prompts under one sharing map.

    Args:
        plan: the map. Its owners alone keep a cache.

    Attributes:
        cache_bytes_per_token: of this rank, measured at the last answers.
    """

    def __init__(self, engine: Engine, run: RunConfig, plan: RoutePlan) -> None:
        self._forward = Forward(engine, run, plan)
        self._in_step = engine.forward_is_collective
        self._device = engine.model.device
        self.cache_bytes_per_token = 0

    @torch.no_grad()
    def continue_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        ends: frozenset[int],
        choose: Choose,
        pad: int,
        is_complete: Callable[[list[int]], bool] = lambda answer: False,
    ) -> list[list[int]]:
        """The answers to some prompts. Collective over this replica's ranks, which all pass the same. Where
        `Engine.forward_is_collective`, all replicas call this equally often, with the same ``new_tokens``.

        Args:
            prompts: token ids, none empty.
            new_tokens: largest number of tokens in an answer.
            ends: tokens that end an answer, and are no part of it.
            choose: logits float32 [b, V] -> int64 [b]; called on the last stage.
            pad: a token for the places before short prompts and behind answers.
            is_complete: (of an answer so far) nothing is added to it.
        """
        longest = max(map(len, prompts))
        begins = torch.tensor([longest - len(prompt) for prompt in prompts], device=self._device)
        tokens = torch.full((len(prompts), longest), pad, device=self._device)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(list(prompt), device=self._device)
        caches = self._forward.new_caches(longest + new_tokens, begins)
        answers: list[list[int]] = [[] for _ in prompts]
        going_on = set(range(len(prompts)))
        for _ in range(new_tokens):
            chosen = self._next(tokens, caches, choose)
            for row, token in enumerate(chosen.tolist()):
                if row in going_on and token in ends:
                    going_on.discard(row)
                elif row in going_on:
                    answers[row].append(token)
                    if is_complete(answers[row]):
                        going_on.discard(row)
            if not self._goes_on(bool(going_on)):
                break
            tokens = chosen[:, None]
        self.cache_bytes_per_token = sum(cache.bytes_per_token() for cache in caches)
        return answers

    def _goes_on(self, here: bool) -> bool:
        """Whether there is another token to be had, here or on a replica with which this one must keep step."""
        if not self._in_step:
            return here
        anywhere = torch.tensor(int(here), device=self._device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
        return bool(anywhere.item())

    def _next(self, tokens: torch.Tensor, caches: Sequence[KvCache], choose: Choose) -> torch.Tensor:
        """One forward over ``tokens`` [b, n]; the chosen next tokens, int64 [b], the same on all ranks."""
        logits = self._forward.logits(tokens, caches)
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


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Greedy: [b, V] -> [b]."""
    return logits.argmax(-1)
