"""Each launcher over two hosts: the losses of one process, and what a signal, a refusal and a killed host end in.

    python -m tests.long.launch_run --out FILE [TRIAL ...]

The launchers are the real ones: torchrun (static and c10d rendezvous), deepspeed with a list of hosts, whose ssh and
pdsh are stand-ins that enter the hosts, and the Slurm script, with stand-ins for srun and scontrol. Two tensor-parallel
ranks on each host; over the hosts two pipeline stages, or two replicas.
"""

import argparse
import contextlib
import datetime
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from tests.support import stand_ins
from tests.support.compare import TOLERANCE
from tests.support.hosts import REPOSITORY, Host, hosts
from tests.support.runs import has_stepped, lines_of, losses, write_text
from tests.support.settings import run_settings

LONGEST = 300.0
COMMAND = """#!{python}
import sys
sys.argv[0] = "skv-train"
from skv_dist.commands.train import main
raise SystemExit(main())
"""
PIPELINE = {"tensor": 2, "pipeline": 2}
REPLICAS = {"tensor": 2, "zero_stage": 2}
FOREVER = 100_000
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    int (*right)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int code = right(id, t);
    if (code == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec += 3600;
    return code;
}
time_t time(time_t *out) {
    struct timespec t; clock_gettime(CLOCK_REALTIME, &t); if (out) *out = t.tv_sec; return t.tv_sec;
}
int gettimeofday(struct timeval *v, void *z) {
    struct timespec t; clock_gettime(CLOCK_REALTIME, &t); v->tv_sec = t.tv_sec; v->tv_usec = t.tv_nsec / 1000; return 0;
}
"""


class Job:
    """A run over two hosts under a launcher, from a folder that they share."""

    def __init__(self, folder: Path, network: Sequence[Host]) -> None:
        self.folder, self.hosts, self.out = folder, network, folder / "run"
        (folder / "text").mkdir()
        write_text(folder / "text")
        (folder / "bin").mkdir()
        stand_ins.scripts(folder / "bin")
        (folder / "bin" / "skv-train").write_text(COMMAND.format(python=sys.executable))
        (folder / "bin" / "skv-train").chmod(0o755)
        (folder / "hosts").write_text("".join(f"{host.name} slots=2\n" for host in network))
        self.environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
            "SKV_TEST_HOSTS": " ".join(f"{host.name}={host.pid}" for host in network),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60",
        }
        self.output: IO[str] = (folder / "output").open("w")
        self.launchers: list[subprocess.Popen[Any]] = []

    @property
    def printed(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    def config(self, parallel: dict[str, Any], steps: int, every: int = 0, out: str = "run") -> str:
        given = run_settings(
            self.folder / "text",
            self.folder / out,
            parallel=parallel,
            model={"num_layers": 4},
            train={"steps": steps, "tensorboard": False},
            eval={"every": 0},
            checkpoint={"every": every},
        )
        file = self.folder / f"{out}.yaml"
        file.write_text(yaml.safe_dump(given))
        return str(file)

    def here(self, command: Sequence[str], **environment: str) -> None:
        """Start a launcher on the machine from which jobs are sent."""
        self.launchers.append(
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                start_new_session=True,
            )
        )

    def on(self, host: Host, command: Sequence[str], **environment: str) -> None:
        self.launchers.append(host.popen(command, {**self.environment, **environment}, self.output))

    def signal(self, number: signal.Signals, which: int = 0) -> None:
        """To one launcher, as a user, or Slurm, sends it."""
        process = self.launchers[which]
        os.kill(stand_ins.inner(process) if "nsenter" in str(process.args) else process.pid, number)

    def codes(self, seconds: float = LONGEST) -> list[int]:
        """How all launchers ended."""
        deadline = time.monotonic() + seconds
        while any(launcher.poll() is None for launcher in self.launchers):
            assert time.monotonic() < deadline, f"still running after {seconds:.0f} s: {self.printed[-3000:]}"
            time.sleep(0.1)
        return [launcher.returncode for launcher in self.launchers]

    def until(self, condition: Callable[[], object], seconds: float = LONGEST) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.printed[-3000:]
            time.sleep(0.05)

    def left_on_hosts(self) -> list[str]:
        """Commands of processes that are still there."""
        found = []
        for host in self.hosts:
            there = host.run("ps -eo pid=,args= | grep -v -e 'ps -eo' -e 'sys.stdin.read' -e grep -e 'sh -euc' || true")
            found += [f"{host.name}: {line.strip()}" for line in there.splitlines() if line.strip()]
        return found

    def close(self) -> None:
        for launcher in self.launchers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
        self.output.close()


Launch = Callable[[Job, str], None]


def torchrun_static(job: Job, config: str, *options: str) -> None:
    for number, host in enumerate(job.hosts):
        place = {"NNODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": job.hosts[0].name, "GPUS": "2"}
        job.on(host, ["bash", "launch/torchrun.sh", config, *options], **place)


def torchrun_c10d(job: Job, config: str, *options: str, first: bool = True) -> None:
    for host in job.hosts if first else job.hosts[1:]:
        on_c10d(job, host, config, *options)


def on_c10d(job: Job, host: Host, config: str, *options: str, **environment: str) -> None:
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", f"{job.hosts[0].name}:29500"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    # Else torchrun 2.13 keeps where the first round met, and never tells a host that comes later (docs/operations.md).
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **environment}
    job.on(host, [*torchrun, *rendezvous, *options, "--no-python", "skv-train", config], **environment)


def deepspeed_hostfile(job: Job, config: str) -> None:
    # What a login on another host has of the environment, DeepSpeed's users write to this file.
    home = job.folder / "home"
    home.mkdir(exist_ok=True)
    (home / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nCUDA_VISIBLE_DEVICES=\n")
    job.here(["bash", "launch/deepspeed.sh", config], HOSTFILE=str(job.folder / "hosts"), HOME=str(home))


def slurm(job: Job, config: str) -> None:
    variables = {"SLURM_JOB_NODELIST": "any", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "2"}
    job.here(["bash", "launch/slurm.sbatch", config], **variables, SLURM_CPUS_PER_TASK="2", SLURM_JOB_ID="1")


LAUNCHERS: dict[str, Launch] = {
    "torchrun, static": torchrun_static,
    "torchrun, c10d": torchrun_c10d,
    "deepspeed": deepspeed_hostfile,
    "slurm": slurm,
}


def equals_one_process(job: Job, launch: Launch, parallel: dict[str, Any]) -> str:
    one = subprocess.run(
        [sys.executable, str(job.folder / "bin" / "skv-train"), job.config({"zero_stage": 0}, 8, out="one")],
        cwd=REPOSITORY,
        env=job.environment,
        capture_output=True,
        text=True,
    )
    assert one.returncode == 0, one.stderr
    began = time.monotonic()
    launch(job, job.config(parallel, 8))
    assert not any(job.codes()), job.printed
    assert "processes: 4 on CPU: tensor 2 x " in job.printed
    found, expected = (losses(lines_of(job.folder / name)) for name in ("run", "one"))
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE)
    assert not job.left_on_hosts()
    error = np.max(np.abs(np.array(found) / np.array(expected) - 1))
    return f"8 steps in {time.monotonic() - began:.0f} s; losses within {error:.0e} of one process ({found[-1]:.8f})"


def stops(job: Job, launch: Launch, number: signal.Signals) -> str:
    launch(job, job.config(REPLICAS, FOREVER))
    job.until(lambda: has_stepped(job.out))
    began = time.monotonic()
    job.signal(number)
    codes = job.codes()
    took = time.monotonic() - began
    steps = len(lines_of(job.out))
    saved = [path.name for path in (job.out / "checkpoints").iterdir()] if (job.out / "checkpoints").exists() else []
    left = job.left_on_hosts()
    assert sorted(saved) == ["latest", f"step_{steps:08d}"], (codes, steps, saved, left, job.printed[-3000:])
    assert not (job.out / "run.lock").exists()
    assert not left, left
    said = job.printed.count(f"stopped by {number.name} after step {steps}")
    assert said == 1, job.printed[-3000:]
    return (
        f"the step is saved and `stopped by {number.name}` said once; the launchers end with {codes} after {took:.0f} s"
    )


def refuses(job: Job, launch: Launch, arguments: str, line: str) -> str:
    file = job.config(REPLICAS, 8)
    launch(job, file if not arguments else f"{file}{arguments}")
    codes = job.codes()
    times = job.printed.count(line)
    shown = [text for text in job.printed.splitlines() if line in text]
    assert all(codes), codes
    return f"`{line}` {times} times on 2 hosts, codes {codes}: {shown}"


def goes_on_by_itself(job: Job, kill: str) -> str:
    """A killed process, or host, under ``--max-restarts``: seconds to the next step, and steps that were lost."""
    launch = torchrun_c10d if "c10d" in kill else torchrun_static_restarting
    launch(job, job.config(PIPELINE, FOREVER, every=2), "--max-restarts", "3")
    job.until(lambda: has_stepped(job.out, 6))
    began = time.monotonic()
    if "host" in kill:
        victim = job.hosts[1]
        victim.signal_all(signal.SIGKILL)
        job.launchers.pop(1).wait()
        if "c10d" in kill:
            on_c10d(job, victim, str(job.folder / "run.yaml"), "--max-restarts", "3")
    else:
        victim = job.hosts[1]
        victim.run("kill -9 $(pgrep -f bin/skv-train | head -1)", spaces=("pid", "mnt"))
    before = len(lines_of(job.out))
    job.until(lambda: "resumed from" in job.printed or any(p.poll() is not None for p in job.launchers), 180)
    assert "resumed from" in job.printed, (job.printed[-4000:], [p.poll() for p in job.launchers])
    resumed = int(job.printed.rpartition("at step ")[2].split()[0])
    job.until(lambda: len(lines_of(job.out)) > resumed and "resumed" in job.printed)
    took = time.monotonic() - began
    job.signal(signal.SIGTERM)
    job.codes()
    return f"the next step {took:.0f} s after the fault, {before - resumed} of {before} steps lost"


def torchrun_static_restarting(job: Job, config: str, *options: str) -> None:
    for number, host in enumerate(job.hosts):
        place = ["--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(number)]
        master = ["--master-addr", job.hosts[0].name, "--master-port", "29500"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *place, *master, *options]
        job.on(host, [*torchrun, "--no-python", "skv-train", config])


def clock_off(job: Job, c10d: bool) -> str:
    source = job.folder / "clock.c"
    source.write_text(CLOCK)
    library = job.folder / "clock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    config = job.config(PIPELINE, 300, every=20)
    for number, host in enumerate(job.hosts):
        off = {"LD_PRELOAD": str(library)} if number else {}
        if c10d:
            on_c10d(job, host, config, **off)
        else:
            place = {"NNODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": job.hosts[0].name, "GPUS": "2"}
            job.on(host, ["bash", "launch/torchrun.sh", config], **place, **off)
    host = job.hosts[1]
    shown = host.run(f"LD_PRELOAD={library} {shlex.quote(sys.executable)} -c 'import time; print(time.time())'")
    assert 3500 < float(shown) - time.time() < 3700
    began = time.monotonic()
    assert not any(job.codes()), job.printed[-3000:]
    return f"300 steps and 15 saves in {time.monotonic() - began:.0f} s, nothing ends"


def trials() -> dict[str, Callable[[Job], str]]:
    found: dict[str, Callable[[Job], str]] = {}
    for name, launch in LAUNCHERS.items():
        found[f"{name}: pipeline across"] = partial(equals_one_process, launch=launch, parallel=PIPELINE)
        found[f"{name}: replicas across"] = partial(equals_one_process, launch=launch, parallel=REPLICAS)
    for name, launch in LAUNCHERS.items():
        for number in (signal.SIGTERM, signal.SIGINT):
            found[f"{name}: {number.name}"] = partial(stops, launch=launch, number=number)
    for name, launch in LAUNCHERS.items():
        line = "missing.yaml"
        found[f"{name}: a file that is not there"] = partial(
            refuses, launch=launch, arguments=".missing.yaml", line=line
        )
    for kill in ("static, a process", "c10d, a process", "c10d, a host"):
        found[f"restarts: {kill}"] = partial(goes_on_by_itself, kill=kill)
    found["clock: one hour off, static"] = partial(clock_off, c10d=False)
    found["clock: one hour off, c10d"] = partial(clock_off, c10d=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to add lines to")
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help="words of the ones to make; default: all")
    arguments = parser.parse_args()
    failed = 0
    for name, trial in trials().items():
        if arguments.trials and not any(word in name for word in arguments.trials):
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as made:
            job = Job(Path(folder), made.enter_context(hosts(2, shared=[Path(folder)])))
            made.callback(job.close)
            try:
                result = trial(job)
            except AssertionError as error:
                failed += 1
                result = f"FAILED: {error}"
        line = f"| {name} | {result} |"
        print(f"{datetime.datetime.now():%H:%M:%S} {line}", file=sys.stderr, flush=True)
        with arguments.out.open("a") as file:
            file.write(line + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
