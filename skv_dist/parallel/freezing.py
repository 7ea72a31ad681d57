"""Weights that stay as they are (``train.freeze``, and with ``lora`` all but the adapters)."""

import fnmatch
from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.model.adapter import is_adapter


def is_frozen(name: str, run: RunConfig) -> bool:
    """Whether the parameter with this global name does not learn."""
    if run.lora.rank and not is_adapter(name):
        return True
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in run.train.freeze)


def freeze(parameters: Mapping[str, torch.nn.Parameter], run: RunConfig) -> None:
    """Switch off the gradients of those parameters of this rank (by global name) that do not learn.

    Collective over the pipeline.

    Raises:
        UserError: a pattern matches no parameter of the model, or a pipeline rank has none left to train.
    """
    if not run.train.freeze and not run.lora.rank:
        return
    group = parallel_state.get_pipeline_model_parallel_group()
    of_ranks: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(of_ranks, list(parameters), group=group)
    for pattern in run.train.freeze:
        if not any(fnmatch.fnmatchcase(name, pattern) for names in of_ranks for name in names):
            raise UserError(
                f"train.freeze: no weight is called '{pattern}'; there are, among others, {', '.join(of_ranks[0][:4])}"
            )
    for rank, names in enumerate(of_ranks):
        if all(is_frozen(name, run) for name in names):
            raise UserError(
                f"train.freeze {run.train.freeze} leaves nothing to train on pipeline rank {rank}: freeze less, or "
                "lower parallel.pipeline"
            )
    for name, parameter in parameters.items():
        parameter.requires_grad_(not is_frozen(name, run))
