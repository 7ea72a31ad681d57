"""Errors, and results of one rank, that all ranks must know of."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from skv_dist.errors import UserError


def first_error(error: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """The first error of any rank of ``group`` (default: all ranks), on all of them; None where there is none.

    Collective over the group.
    """
    errors: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    return next((text for text in errors if text is not None), None)


def on_first_rank(compute: Callable[[], Any]) -> Any:
    """What ``compute()`` returns on the first rank, on all of them. Collective.

    Raises:
        UserError: it raised one; on all ranks alike.
    """
    told: list[Any] = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            told[0] = compute()
        except UserError as problem:
            told[1] = str(problem)
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise UserError(told[1])
    return told[0]
