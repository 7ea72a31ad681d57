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


def trained_without_drawing(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """`run_training`, where drawing an initial value is an error."""
    from tests.support.jobs.loop import run_training

    def refused(*given: Any) -> Any:
        raise AssertionError("initial values were drawn")

    with patch("skv_dist.parallel.initial_values.initial_rows", refused):
        return run_training(settings)


def computed_without_values(settings: dict[str, Any]) -> list[str | None]:
    """What a batch ends with where no weight has a value, where all but the last norm's have, and where all have."""
    import torch

    from skv_dist.parallel.engines.base import Quantity
    from skv_dist.parallel.engines.create import create_engine

    def problem() -> str | None:
        try:
            engines.run_step(engine, run, world, 1)
        except RuntimeError as error:
            return str(error)
        return None

    with built(settings) as (run, world):
        engine = create_engine(run, world.device, initialize=False)
        messages = [problem()]
        named = dict(engine.model.named())
        last = named.pop("final_norm.weight")
        for rest in (named.values(), [last]):
            for parameter in rest:
                shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
                engine.write(parameter, Quantity.WEIGHT, torch.full(shape, 0.01))
            messages.append(problem())
        engine.close()
        return messages


def largest_at_start(settings: dict[str, Any], block_elements: int) -> tuple[int, int, int]:
    """Elements of the largest tensor that is made while an engine is, of the largest part and largest full parameter
    that are drawn."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from skv_dist.model import initialize
    from skv_dist.parallel.engines.create import create_engine
    from skv_dist.parallel.tensor_split import split_of

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for value in tree_leaves(out):
                if isinstance(value, torch.Tensor):
                    self.elements = max(self.elements, value.numel())
            return out

    with built(settings) as (run, world), patch.object(initialize, "_BLOCK_ELEMENTS", block_elements):
        with Largest() as largest:
            engine = create_engine(run, world.device)
        shapes = {name: tuple(parameter.shape) for name, parameter in engine.model.named()}
        engine.close()
        part = max(torch.Size(shape).numel() for shape in shapes.values())
        full = max(torch.Size(split_of(name, run).full_shape(shape)).numel() for name, shape in shapes.items())
        return largest.elements, part, full
