"""Process groups: torch.distributed, Megatron's parallel_state, and the view of them that DeepSpeed wants."""

import contextlib
import datetime
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from skv_dist.config.parallel import ParallelConfig
from skv_dist.errors import UserError
from skv_dist.parallel.processes import attempt, launcher

_ours: set[str] = set()  # variables that no launcher had set
# DeepSpeed wants to see all of them. Nobody listens on the port: a process alone meets nobody.
_DEFAULTS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@dataclass(frozen=True)
class World:
    """Where this process stands."""

    rank: int
    size: int
    device: torch.device
    tensor_rank: int
    data_rank: int
    data_size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(parallel: ParallelConfig) -> World:
    """Create all process groups, in Megatron's rank order (tp, cp, dp, pp).

    Under plain python, without a launcher, the process is a world of one.

    Raises:
        UserError: the launcher's variables are wrong, there are fewer GPUs on this host than local ranks, or the
            processes cannot meet.
    """
    launcher.world_size()
    on_gpu = torch.cuda.is_available()
    if on_gpu and os.environ.get("DS_ACCELERATOR") == "cpu":
        raise UserError(
            "DS_ACCELERATOR is cpu, but torch sees a GPU: set CUDA_VISIBLE_DEVICES to nothing to use the CPU, or unset "
            "DS_ACCELERATOR"
        )
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from skv_dist.parallel.processes import cpu_platform

        cpu_platform.install()
    for name, value in _DEFAULTS.items():
        if name not in os.environ:
            os.environ[name] = value
            _ours.add(name)
    device = torch.device("cpu")
    if on_gpu:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU of its own: this host has {torch.cuda.device_count()}; "
                "start fewer processes"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=parallel.timeout_minutes)
        try:
            with _connecting():
                _init("nccl" if on_gpu else "gloo", timeout)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            place = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
            raise UserError(
                f"the processes cannot meet at {place} ({_cause(error)}): set MASTER_ADDR to the host of rank 0 and "
                "MASTER_PORT to a port that is free there"
            ) from error

    from megatron.core import parallel_state

    with _connecting():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=max(1, round(parallel.timeout_minutes)),
        )
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def _init(backend: str, timeout: datetime.timedelta) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # A process alone needs no port, which many that start at once would take from each other.
    store = dist.HashStore() if size == 1 else attempt.own_store(timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)


@contextlib.contextmanager
def _connecting() -> Iterator[None]:
    """Turns gloo's failure to reach another process into one line.

    Raises:
        UserError: in place of gloo's error, which is a plain RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if not (found := re.search(r"connectFullMesh failed with (?:\[[^]]*\] )?(.*)", str(error))):
            raise
        raise UserError(
            f"rank {dist.get_rank() if dist.is_initialized() else os.environ['RANK']} cannot reach another process "
            f"({found[1]}): it has ended, or a network lets nothing through; let the hosts of a run reach each other "
            "on all ports"
        ) from error


def leave_model_parallel() -> None:
    """Destroy Megatron's groups, so that `start` can make others in the same world."""
    from megatron.core import parallel_state

    # Megatron only forgets them. Each gloo group keeps three threads, of which one wakes every few milliseconds.
    made = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in made:
        if group is not None:  # which stands for the world
            dist.destroy_process_group(group)


def stop() -> None:
    """Destroy all process groups."""
    leave_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    while _ours:  # or the next process that is started from here would take itself for a part of this world
        os.environ.pop(_ours.pop(), None)


def _cause(error: Exception) -> str:
    """What the system said; torch puts its own account, a stack of C++ calls at times, around it."""
    return re.sub(r"^\[[^]]*\]:? *", "", str(error).strip().splitlines()[0])


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Make dropout a pure function of the position in the run and of the stage.

    Each tensor-parallel rank has a stream of its own beside the common one.
    """
    from megatron.core import parallel_state, tensor_parallel

    from skv_dist.routing.draw import DrawKey, words

    key = DrawKey(seed, step, micro_batch, part=parallel_state.get_pipeline_model_parallel_rank())
    value = words(key, b"dropout", 1)[0] >> 2  # torch takes 63 bits, Megatron adds to it
    if torch.cuda.is_available():
        tensor_parallel.model_parallel_cuda_manual_seed(value)
        return
    torch.manual_seed(value)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.add("model-parallel-rng", value + 2718 + parallel_state.get_tensor_model_parallel_rank())


def model_parallel_unit() -> Any:
    """Megatron's groups under the names that DeepSpeed asks its ``mpu`` for.

    The class must have no ``initialize_sequence_parallel``: DeepSpeed would take it for Ulysses sequence parallelism.
    """
    from megatron.core import parallel_state as state

    class ModelParallelUnit:
        @staticmethod
        def get_model_parallel_rank() -> int:
            return dist.get_rank(state.get_model_parallel_group())

        @staticmethod
        def get_model_parallel_world_size() -> int:
            return dist.get_world_size(state.get_model_parallel_group())

        get_model_parallel_group = staticmethod(state.get_model_parallel_group)

    for group in ("tensor_model_parallel", "pipeline_model_parallel", "data_parallel"):
        for quantity in ("rank", "world_size", "group"):
            name = f"get_{group}_{quantity}"
            setattr(ModelParallelUnit, name, staticmethod(getattr(state, name)))
    return ModelParallelUnit
