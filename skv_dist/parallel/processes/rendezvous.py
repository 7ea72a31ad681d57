"""Wait for all processes, for as long as it takes."""

import itertools
import time

import torch.distributed as dist

_LOOK_SECONDS = 1.0
_meetings = itertools.count()  # every process has the same ones, in the same order


def wait_for_all() -> None:
    """Return once every process has called this as often as this one.

    In contrast to a barrier nothing times out, and nothing stands in a communicator meanwhile: some processes may
    tokenize for hours while the others wait. That one has ended is noticed by the heartbeat.
    """
    size = dist.get_world_size()
    if size == 1:
        return
    own_client = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # of the base class
    store = dist.PrefixStore("skv_dist/rendezvous", own_client)
    meeting = str(next(_meetings))
    arrived = store.add(meeting, 1)
    while arrived < size:
        time.sleep(min(_LOOK_SECONDS, 0.01 * size))
        arrived = store.add(meeting, 0)
