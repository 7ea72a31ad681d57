"""Losses of many maps on the same sequences, together and one by one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.support.batches import local_batches
from tests.support.engine import assign_initial_values, built, frozen_engine


def losses_of_maps(settings: dict[str, Any], tables: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Summed losses of the sequences under each map, float64 [maps, n] ("together", "alone"), and how often layers ran
    for each of both."""
    import torch

    from skv_dist.evaluation.search.sequences import SequenceLosses, _over_replicas, shares_prefixes
    from skv_dist.routing import RoutePlan

    with built(settings) as (run, world):
        engine = frozen_engine(run, world)
        assign_initial_values(engine, run)
        with torch.no_grad():  # initial layers hardly change the loss
            for name, parameter in engine.model.named():
                if "layers." in name and parameter.dim() > 1:
                    parameter.mul_(8)
        batches = local_batches(run, world, 0)
        losses = SequenceLosses(engine, run, batches)
        runs = [0]

        def count(*_: object) -> None:
            runs[0] += 1

        for layer in (layer for chunk in engine.model.routed_chunks() for layer in chunk.routed_layers()):
            layer.register_forward_pre_hook(count)
        assert shares_prefixes(run) == (run.parallel.pipeline == 1)
        together = np.hstack([losses(tables, part) for part in range(len(losses.counts))])
        runs_together, runs[0] = runs[0], 0
        alone = [
            np.concatenate(
                [
                    _over_replicas(losses._alone(RoutePlan(table), part))[counted]
                    for part, counted in zip(losses._parts, losses._counted, strict=True)
                ]
            )
            for table in tables
        ]
        return {
            "together": together,
            "alone": np.stack(alone),
            "runs_together": runs_together / len(batches),
            "runs_alone": runs[0] / len(batches),
        }
