"""The launch scripts, with stand-ins for Slurm and torchrun: what they hand on."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SHOWN = ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "SRUN_CPUS_PER_TASK", "CUDA_VISIBLE_DEVICES")


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment in which ``python`` prints its arguments and some variables, and Slurm runs things here."""
    scripts = {
        "python": 'printf "%s\\n" "${@:3}"; ' + "; ".join(f'echo "{name}=${{{name}-unset}}"' for name in SHOWN),
        "srun": 'exec "$@"',
        "scontrol": "echo host0; echo host1",
        "nvidia-smi": "exit 1",
    }
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in SHOWN and not name.startswith("MASTER_")}
    return {**kept, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def printed(script: str, environment: dict[str, str], *arguments: str) -> list[str]:
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_torchrun_gets_a_long_grace_and_the_arguments_as_they_are(stand_ins: dict[str, str]) -> None:
    lines = printed("torchrun.sh", stand_ins, "a b.yaml", "train.output_dir=c #d")
    assert lines[:2] == ["--nproc-per-node", "2"]
    assert lines[-6:-3] == ["skv-train", "a b.yaml", "train.output_dir=c #d"]
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in lines
    asked = printed("torchrun.sh", {**stand_ins, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}, "a.yaml")
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=60" in asked


def test_slurm_hands_on_cpus_hosts_and_the_grace(stand_ins: dict[str, str]) -> None:
    job = {"SLURM_JOB_NODELIST": "host[0-1]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    job |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64"}
    lines = printed("slurm.sbatch", {**stand_ins, **job}, "a b.yaml", "train.output_dir=c #d")
    given = dict(zip(lines, lines[1:]))
    assert [given[f"--{name}"] for name in ("nproc-per-node", "nnodes", "node-rank")] == ["8", "2", "1"]
    assert given["--master-addr"] == "host0"
    assert lines[-6:-3] == ["skv-train", "a b.yaml", "train.output_dir=c #d"]
    assert {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=115", "SRUN_CPUS_PER_TASK=64"} <= set(lines)


@pytest.mark.parametrize(("accelerator", "visible"), [(None, ""), ("cpu", ""), ("cuda", "unset")])
def test_gpus_are_hidden_where_deepspeed_uses_the_cpu(tmp_path: Path, accelerator: str | None, visible: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in (*SHOWN, "DS_ACCELERATOR")}
    if accelerator:
        environment["DS_ACCELERATOR"] = accelerator
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "common.sh").write_text((LAUNCH / "common.sh").read_text())
    for name in ("bin/activate", "bin/python", "installed"):
        (tmp_path / ".venv" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".venv" / name).touch()
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    script = '. "$0/launch/common.sh" && echo "${CUDA_VISIBLE_DEVICES-unset}"'
    done = subprocess.run(["bash", "-c", script, tmp_path], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == visible
