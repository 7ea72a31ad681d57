"""What launchers leave in the environment: whole numbers that fit each other, and no copies that do not know it."""

import pytest

from skv_dist.errors import UserError
from skv_dist.parallel.processes import launcher

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host0", "MASTER_PORT": "29500"}
EVERY = (*WHOLE, *launcher._COPIES, "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EVERY:
        monkeypatch.delenv(name, raising=False)


def size_with(monkeypatch: pytest.MonkeyPatch, **variables: str) -> int:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return launcher.world_size()


def test_plain_python_is_one_process_and_launchers_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher.world_size() == 1
    assert size_with(monkeypatch, SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="1") == 1  # a batch script, a shell of salloc
    assert size_with(monkeypatch, **WHOLE, OMPI_COMM_WORLD_SIZE="4") == 4
    assert size_with(monkeypatch, SLURM_STEP_NUM_TASKS="2") == 4  # torchrun under srun


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "", r"WORLD_SIZE is '', not a whole number: .*unset it"),
        ("WORLD_SIZE", "four", "WORLD_SIZE is 'four', not a whole number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is 0, but must be at least 1"),
        ("RANK", "4", "RANK 4 is not below WORLD_SIZE 4"),
        ("RANK", "-1", "RANK is -1, but must be at least 0"),
        ("RANK", "1.0", "RANK is '1.0', not a whole number"),
        ("LOCAL_RANK", "x", "LOCAL_RANK is 'x', not a whole number"),
        ("MASTER_PORT", "0", "MASTER_PORT is 0, but must be between 1 and 65535"),
        ("MASTER_PORT", "65536", "MASTER_PORT is 65536, but must be between 1 and 65535"),
        ("MASTER_PORT", "http", "MASTER_PORT is 'http', not a whole number"),
        ("MASTER_ADDR", "", "WORLD_SIZE is 4, but MASTER_ADDR is not set"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        size_with(monkeypatch, **{**WHOLE, name: value})


@pytest.mark.parametrize("name", sorted(WHOLE.keys() - {"WORLD_SIZE"}))
def test_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(UserError, match=f"WORLD_SIZE is 4, but {name} is not set: .*unset WORLD_SIZE"):
        size_with(monkeypatch, **{key: value for key, value in WHOLE.items() if key != name})


@pytest.mark.parametrize("name", sorted(launcher._COPIES))
def test_copies_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(UserError, match=f"has started 4 copies of this command .{name}., .*one torchrun on each host"):
        size_with(monkeypatch, **{name: "4"})
