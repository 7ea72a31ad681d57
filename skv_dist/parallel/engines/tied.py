"""A head that is tied to an embedding on another pipeline stage.

The first stage owns the weight. The last stage works on a copy that is no parameter; its gradient is carried to the
first stage once a step, where one more backward adds it to the embedding's. So the weight has one optimizer state, the
gradient norm counts it once, and every ZeRO stage takes its gradient the usual way.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.parallel.freezing import is_frozen
from skv_dist.parallel.local_model import LocalModel


class TiedHead:
    """Both ends of the tie; does nothing on stages between, or where one chunk holds embedding and head.

    Args:
        model: the chunks of this rank.
        whole: gives the embedding's weight [v, h], in the precision of the run, where an engine has sharded it.
    """

    def __init__(
        self,
        model: LocalModel,
        run: RunConfig,
        whole: Callable[[torch.nn.Parameter], torch.Tensor] = lambda weight: weight.detach(),
    ) -> None:
        chunks = model.routed_chunks()
        first, last = chunks[0], chunks[-1]
        self._group = None
        if not first.tie_embeddings or parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return
        self._learns = not is_frozen("embedding.weight", run)
        if not (first.has_embedding or last.has_head):
            return
        self._group = parallel_state.get_embedding_group()  # first and last stage
        ranks = dist.get_process_group_ranks(self._group)
        self._first_stage, self._last_stage = ranks[0], ranks[-1]
        self._owns = first.has_embedding
        if self._owns:
            self._embedding, self._whole = first.embedding, whole
            return
        config = last.config
        rows = last.output_layer.output_size_per_partition
        self._weight = torch.zeros(rows, config.hidden_size, dtype=config.params_dtype, device=model.device)
        last.tied_weight = self._weight
        if not self._learns:
            return
        self._weight.requires_grad_().register_post_accumulate_grad_hook(self._accumulate)
        self._gradient = torch.zeros(rows, config.hidden_size, device=model.device)  # fp32, over micro-batches

    def _accumulate(self, copy: torch.Tensor) -> None:
        assert copy.grad is not None
        self._gradient.add_(copy.grad)
        copy.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Carry the weight to the last stage. Collective over both."""
        if self._group is not None:
            weight = self._whole(self._embedding.weight) if self._owns else self._weight.detach()
            dist.broadcast(weight, self._first_stage, group=self._group)

    def gradient(self) -> torch.Tensor | None:
        """The head's part of the gradient since the last call, fp32, on the first stage. Collective over both."""
        if self._group is None or not self._learns:
            return None
        if self._owns:
            weight = self._embedding.weight
            gradient = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            dist.broadcast(gradient, self._last_stage, group=self._group)
            return gradient
        dist.broadcast(self._gradient, self._last_stage, group=self._group)
        self._gradient.zero_()
        return None
