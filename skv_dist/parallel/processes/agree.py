"""Errors that all ranks must know of."""

import torch.distributed as dist


def first_error(error: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """The first error of any rank of ``group`` (default: all ranks), on all of them; None where there is none.

    Collective over the group.
    """
    errors: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    return next((text for text in errors if text is not None), None)
