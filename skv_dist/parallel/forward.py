"""Logits of a batch under one sharing map, in any layout without sequence parallelism and interleaved stages."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from skv_dist.config.run import RunConfig
from skv_dist.model.kv_cache import KvCache
from skv_dist.parallel.engines.base import Engine
from skv_dist.parallel.wire.communicator import WireCommunicator
from skv_dist.parallel.wire.port import ChunkPort
from skv_dist.parallel.wire.widths import wire_widths
from skv_dist.routing import RoutePlan


class Forward:
    """Runs batches through all stages of this replica, one after the other.

    Args:
        plan: the sharing map.
    """

    def __init__(self, engine: Engine, run: RunConfig, plan: RoutePlan) -> None:
        self._engine, self._run, self._plan = engine, run, plan
        self._widths = wire_widths(run, [plan])
        (chunk,) = engine.model.routed_chunks()
        self._port = ChunkPort(chunk, 0, 1)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, cache: KvCache | None = None, gather: bool = True) -> torch.Tensor | None:
        """Collective over this replica's ranks, which all pass the same ``tokens`` [b, s].

        Args:
            cache, gather: see `RoutedChunk.forward`, which also says the shape of the logits.

        Returns:
            None on other stages than the last.
        """
        self._engine.eval()
        # What is compiled is so for one length of sequence; here each batch has another.
        stance = torch.compiler.set_stance("force_eager") if self._run.train.compile else contextlib.nullcontext()
        with stance:
            return self._run_schedule(tokens, cache, gather)

    def _run_schedule(self, tokens: torch.Tensor, cache: KvCache | None, gather: bool) -> torch.Tensor | None:
        def forward_step(waiting: Iterator[Any], port: ChunkPort) -> tuple[torch.Tensor, object]:
            out = self._engine.forward(
                0,
                self._plan,
                tokens,
                received=port.take_input(),
                width=self._widths.padded,
                cache=cache,
                gather=gather,
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
