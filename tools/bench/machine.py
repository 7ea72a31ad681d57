"""The machine that a benchmark runs on: what reports say of it, and waiting for it."""

import datetime

import torch

from skv_dist.config.run import Derived, RunConfig
from skv_dist.versions import software


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def heading(device: torch.device, versions: str | None = None) -> str:
    """``date, device, versions``: the beginning of every report.

    Args:
        versions: of what the benchmark measures, where that is not our own training.
    """
    return f"{datetime.date.today()}, {device_name(device)}, {versions or software()}"


def layout(run: RunConfig, derived: Derived) -> str:
    """How a run is laid out over its processes."""
    parallel = run.parallel
    return (
        f"{derived.world_size} processes: tensor {parallel.tensor}, pipeline {parallel.pipeline}, chunks "
        f"{parallel.virtual_pipeline}, data {derived.data_parallel}, ZeRO {parallel.zero_stage}"
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock read next counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
