"""The lock of an output folder, taken by several processes."""

from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.engine import built
from tests.support.settings import config


def hold(folder: str) -> str | None:
    """Take the lock of ``folder`` and let it go; the error, if there is one."""
    from skv_dist.errors import UserError
    from skv_dist.training import lock

    with built(config(parallel={"zero_stage": 0})):
        try:
            lock.FolderLock(Path(folder)).release()
        except UserError as error:
            return str(error)
    return None


def hold_where_the_second_sees_nothing(folder: str) -> str | None:
    """As `hold`; to the second process the folder is empty, as on another host's disk."""
    import torch.distributed as dist

    from skv_dist.training import lock

    right = lock._read

    def read(file: Path) -> dict[str, Any]:
        return {} if dist.get_rank() == 1 else right(file)

    with mock.patch.object(lock, "_read", read), mock.patch.object(lock, "_SHARED_WITHIN", 0.2):
        return hold(folder)
