"""What is drawn where when an engine is made."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support import engine as engines
from tests.support.engine import built


def drawn_elements(settings: dict[str, Any], block_elements: int) -> tuple[int, dict[str, str]]:
    """How many values this rank drew, and a digest of each full parameter.

    Args:
        block_elements: drawn and handed round at once.
    """
    from skv_dist.model import initialize
    from skv_dist.parallel import initial_values
    from skv_dist.parallel.engines.create import create_engine

    count = 0
    rows = initial_values.initial_rows

    def counting(*given: Any) -> Iterator[Any]:
        nonlocal count
        for values in rows(*given):
            count += values.numel()
            yield values

    with (
        built(settings) as (run, world),
        patch.object(initialize, "_BLOCK_ELEMENTS", block_elements),
        patch.object(initial_values, "initial_rows", counting),
    ):
        engine = create_engine(run, world.device)
        weights = engines.full_weights(engine, run)
        engine.close()
        return count, {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in weights.items()}


def loaded_into_nan(settings: dict[str, Any], folder: str) -> tuple[bool, list[str]]:
    """Make an engine without initial values, spoil it, and load a checkpoint: whether anything was drawn, and which
    parameters are not whole afterwards."""
    import numpy as np
    import torch

    from skv_dist.checkpoint.load import load_checkpoint
    from skv_dist.parallel.engines.base import Quantity
    from skv_dist.parallel.engines.create import create_engine

    drew = False

    def noticed(*args: Any) -> Any:
        nonlocal drew
        drew = True
        return iter(())

    with built(settings) as (run, world), patch("skv_dist.parallel.initial_values.initial_rows", noticed):
        engine = create_engine(run, world.device, initialize=False)
        for parameter in engine.model.parameters():
            nan = torch.full(tuple(getattr(parameter, "ds_shape", parameter.shape)), float("nan"))
            engine.write(parameter, Quantity.WEIGHT, nan)
        load_checkpoint(engine, run, Path(folder), weights_only=False)
        weights = engines.full_weights(engine, run)
        engine.close()
        return drew, [name for name, value in weights.items() if not np.isfinite(value).all()]
