"""What the launcher says about this process in environment variables, checked before it is believed."""

import os

from skv_dist.errors import UserError

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LEAST_AND_LIMIT = {"RANK": (0, None), "WORLD_SIZE": (1, None), "LOCAL_RANK": (0, None), "MASTER_PORT": (1, 65536)}
_CURE = "start through torchrun or deepspeed, or unset it for one process"

# The number of copies that other launchers start. Slurm's batch script and salloc's shell run one process each,
# whatever SLURM_NTASKS says; only srun sets the number of the step.
_COPIES = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun or srun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "MPI_LOCALNRANKS": "mpirun",
    "FLUX_JOB_SIZE": "flux",
    "JSM_NAMESPACE_SIZE": "jsrun",
}


def world_size() -> int:
    """Number of processes that ``torchrun`` or ``deepspeed`` started; 1 under plain python.

    Raises:
        UserError: the variables contradict each other or are no numbers, or another launcher has started copies of
            this process that know nothing of each other.
    """
    numbers = {name: _number(name) for name in _LEAST_AND_LIMIT if name in os.environ}
    size = numbers.get("WORLD_SIZE", 1)
    if numbers.get("RANK", 0) >= size:
        raise UserError(f"RANK {numbers['RANK']} is not below WORLD_SIZE {size}: {_CURE}")
    if size > 1:
        for name in _NEEDED:
            if not os.environ.get(name):
                raise UserError(f"WORLD_SIZE is {size}, but {name} is not set: {_CURE.replace('it', 'WORLD_SIZE')}")
    if "RANK" not in numbers and "WORLD_SIZE" not in numbers:
        for name, launcher in _COPIES.items():
            copies = os.environ.get(name, "1")
            if copies.isdecimal() and int(copies) > 1:
                raise UserError(
                    f"{launcher} has started {copies} copies of this command ({name}), each of which would be a run "
                    "of its own: let it start one torchrun on each host, as launch/slurm.sbatch does"
                )
    return size


def _number(name: str) -> int:
    text, (least, limit) = os.environ[name], _LEAST_AND_LIMIT[name]
    try:
        number = int(text)
    except ValueError:
        raise UserError(f"environment variable {name} is {text!r}, not a whole number: {_CURE}") from None
    if number < least or (limit is not None and number >= limit):
        bounds = f"at least {least}" if limit is None else f"between {least} and {limit - 1}"
        raise UserError(f"environment variable {name} is {number}, but must be {bounds}: {_CURE}")
    return number
