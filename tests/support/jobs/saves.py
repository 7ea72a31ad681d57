"""What a save sends, and what each rank writes in it."""

from typing import Any

from tests.support.engine import built, made_engine


def snapshot_of(settings: dict[str, Any]) -> tuple[list[str], int, int]:
    """(collectives that were called, elements that this rank copied, elements of the largest parameter).

    Calls are those of a snapshot, and of writing every value back into the engine.
    """
    import torch
    from skv_tools.bench.traffic import watched_traffic

    from skv_dist.checkpoint.shards import snapshot
    from skv_dist.parallel.engines.base import Quantity
    from skv_dist.parallel.local_model import partitioned_shape

    with built(settings) as (run, world), made_engine(run, world) as engine:
        engine.prepare_moments()
        with watched_traffic() as traffic:
            shards = snapshot(engine, run)
            for parameter in engine.model.parameters():
                for quantity in Quantity:
                    engine.write(parameter, quantity, torch.zeros(partitioned_shape(parameter)))
        copied = sum(block.numel() for pieces in shards.values() for block in pieces._blocks.values())
        largest = max(torch.Size(partitioned_shape(p)).numel() for p in engine.model.parameters())
        return traffic.calls, copied, largest


def noticed_payloads() -> dict[str, list[int]]:
    """The bytes that are noticed of each way to send eight float32 from a rank of two."""
    import torch
    import torch.distributed as dist
    from skv_tools.bench.traffic import watched_traffic

    rank, whole = dist.get_rank(), torch.ones(8)
    ways = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "reduce": lambda: dist.reduce(whole, 0),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "all_gather": lambda: dist.all_gather([torch.empty(4), torch.empty(4)], whole[:4]),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.empty(8), whole[:4]),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(torch.empty(4), whole),
        "gather": lambda: dist.gather(whole[:4], [torch.empty(4), torch.empty(4)] if rank == 0 else None),
        "scatter": lambda: dist.scatter(torch.empty(4), [whole[:4], whole[4:]] if rank == 0 else None),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty(8), whole),
        "send and recv": lambda: dist.send(whole, 1) if rank == 0 else dist.recv(torch.empty(8), 0),
    }
    noticed = {}
    for name, send in ways.items():
        with watched_traffic() as traffic:
            send()
        noticed[name] = traffic.payloads
    return noticed
