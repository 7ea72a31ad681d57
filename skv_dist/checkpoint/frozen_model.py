"""A finished checkpoint as a frozen model."""

from collections.abc import Sequence
from pathlib import Path

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import load_checkpoint, verify_everywhere
from skv_dist.config.run import RunConfig
from skv_dist.parallel.engines.frozen import FrozenEngine
from skv_dist.parallel.processes.groups import World

_ONE_PROCESS = [
    "parallel.tensor=1",
    "parallel.sequence_parallel=false",
    "parallel.zero_stage=0",
    "parallel.overlap_comm=false",
    "train.compile=false",
    "parallel.pipeline=1",
    "parallel.virtual_pipeline=1",
    "parallel.first_stage_layers=null",
    "parallel.last_stage_layers=null",
]


def config_of(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The complete configuration of a checkpoint, laid out over one process unless ``overrides`` say otherwise.

    Raises:
        UserError: ``folder`` is no checkpoint.
    """
    files.require_plain(folder)
    return files.read_config(folder, [*_ONE_PROCESS, *overrides])


def frozen_model(run: RunConfig, folder: Path, world: World) -> FrozenEngine:
    """The weights of a checkpoint in ``run``'s layout, for forwards only. Collective.

    Raises:
        UserError: the checkpoint is damaged or does not fit ``run``.
    """
    engine = FrozenEngine(run, world.device)
    verify_everywhere(folder)
    load_checkpoint(engine, run, folder, weights_only=True)
    return engine
