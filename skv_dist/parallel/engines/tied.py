"""A head that is tied to an embedding on another pipeline stage.

The first stage owns the weight. The last stage works on a copy that is no parameter; its gradient is carried to the
first stage once a step, where one more backward adds it to the embedding's. So the weight has one optimizer state, the
gradient norm counts it once, and every ZeRO stage takes its gradient the usual way.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.parallel.local_model import Root


class TiedHead:
    """Both ends of the tie; does nothing on stages between, or where one chunk holds embedding and head.

    Args:
        root: the chunks of this rank.
    """

    def __init__(self, root: Root) -> None:
        first: Any = root.chunks[0]
        last: Any = root.chunks[-1]
        self._group = None
        if not first.tie_embeddings or parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return
        if not (first.has_embedding or last.has_head):
            return
        self._group = parallel_state.get_embedding_group()  # first and last stage
        ranks = dist.get_process_group_ranks(self._group)
        self._owner, self._user = ranks[0], ranks[-1]
        self._weight: torch.Tensor | None = first.embedding.weight if first.has_embedding else None
        if self._weight is None:
            rows = last.output_layer.output_size_per_partition
            config = last.config
            copy = torch.zeros(rows, config.hidden_size, dtype=config.params_dtype, device=root.device)
            last.tied_weight = copy.requires_grad_()
            copy.register_post_accumulate_grad_hook(self._accumulate)
            self._copy = copy
            self._gradient = torch.zeros(rows, config.hidden_size, device=root.device)  # fp32, over micro-batches

    def _accumulate(self, copy: torch.Tensor) -> None:
        assert copy.grad is not None
        self._gradient.add_(copy.grad)
        copy.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Carry the weight to the last stage. Collective over both."""
        if self._group is not None:
            weight = self._copy if self._weight is None else self._weight
            dist.broadcast(weight.detach(), self._owner, group=self._group)

    def gradient(self) -> torch.Tensor | None:
        """The head's part of the gradient since the last call, fp32, on the first stage. Collective over both."""
        if self._group is None:
            return None
        if self._weight is None:
            dist.broadcast(self._gradient, self._user, group=self._group)
            self._gradient.zero_()
            return None
        gradient = torch.empty(self._weight.shape, dtype=torch.float32, device=self._weight.device)
        dist.broadcast(gradient, self._user, group=self._group)
        return gradient
