"""`skv-eval` on the checkpoint of a run."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from skv_dist.checkpoint import folder as files
from tests.support.jobs.loop import run_training
from tests.support.processes import Command, free_port, places
from tests.support.runs import EVALUATE
from tests.support.settings import run_settings

STEPS = 3


@pytest.fixture(scope="module")
def run(workers: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(last checkpoint, last line of metrics) of a run over two replicas, in a layout that one process cannot have."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    layout = {"zero_stage": 2, "overlap_comm": True}
    given = run_settings(text, out, train={"steps": STEPS}, eval={"every": STEPS}, parallel=layout)
    lines = workers(2)(run_training, given)[0]
    return files.folder_of(out / "checkpoints", STEPS), lines[-1]


def evaluate(folder: Path, checkpoint: Path, *arguments: object, processes: int = 1) -> tuple[str, dict[str, float]]:
    """What the first process printed, and the losses."""
    port = free_port()
    given = [str(checkpoint), *map(str, arguments), "--json", str(folder / "losses.json")]
    commands = [
        Command(EVALUATE, given, places(rank, processes, port), folder / f"{rank}.log") for rank in range(processes)
    ]
    for command in commands:
        assert command.wait() == 0, command.printed
    return commands[0].printed, json.loads((folder / "losses.json").read_text())


def test_losses_are_those_of_the_run_and_text_is_sampled(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    checkpoint, metrics = run
    maps = ("--retention", 1, 0.5, "--cached-layers", 0, 2, 4, 6, "--cached-layers", 1, 0)
    printed, losses = evaluate(tmp_path, checkpoint, *maps, "--prompt", "the ", "--new-tokens", 5)
    assert set(losses) == {"loss@1.00", "loss@0.50", "loss@layers 0,2,4,6", "loss@layers 0,1"}
    for name in ("loss@1.00", "loss@0.50"):
        assert losses[name] == pytest.approx(metrics[f"eval/{name}"], rel=1e-6)
    assert losses["loss@layers 0,2,4,6"] == losses["loss@0.50"]
    assert printed.count("sampled under") == 4
    assert "2 of 8 layers cached" in printed


def test_a_prompt_alone_needs_no_text_of_the_run(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    given = [str(run[0]), "--prompt", "the ", "--new-tokens", "2", f"data.sources.0.path={tmp_path / 'gone'}"]
    for more, code, said in (([], 0, "--- sampled under @0.50"), (["--samples", "1"], 2, f"{tmp_path / 'gone'}")):
        command = Command(EVALUATE, [*given, *more], {}, tmp_path / "printed.log")
        assert command.wait() == code, command.printed
        assert said in command.printed
        assert "nats/token" not in command.printed


def test_another_layout_measures_the_same(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    checkpoint, metrics = run
    _, losses = evaluate(tmp_path, checkpoint, "parallel.tensor=2", "parallel.pipeline=2", processes=4)
    assert losses == pytest.approx({name: metrics[f"eval/{name}"] for name in losses}, rel=1e-5)


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    command = Command(EVALUATE, [str(tmp_path / "gone")], {}, tmp_path / "printed.log")
    assert command.wait() == 2
    assert "Traceback" not in command.printed
    assert str(tmp_path / "gone") in command.printed


def test_a_process_alone_needs_no_port(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Many that start at once on one machine would take it from each other."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(busy.getsockname()[1])}
        command = Command(EVALUATE, [str(run[0]), "eval.samples=1"], place, tmp_path / "log")
        assert command.wait() == 0, command.printed


def test_other_text_is_measured_without_that_of_the_run(workers: Any, text: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"story": f"{number} times {number} is {number * number}. " * 8}) for number in range(200)]
    sources = []
    for name, part in (("seen", lines[:120]), ("other", lines[120:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
        sources.append({"path": str(tmp_path / f"{name}.jsonl"), "format": "jsonl", "text_field": "story"})
    data = {"sources": sources[:1], "validation_sources": sources[1:]}
    settings = run_settings(text, tmp_path / "run", train={"steps": STEPS}, eval={"every": STEPS}, data=data)
    metrics = workers(1)(run_training, settings)[0][-1]
    (tmp_path / "seen.jsonl").unlink()  # as on another machine
    moved = (tmp_path / "other.jsonl").rename(tmp_path / "größer 😀.jsonl")
    checkpoint = files.folder_of(tmp_path / "run" / "checkpoints", STEPS)
    _, losses = evaluate(tmp_path, checkpoint, "--data", moved)
    assert losses == pytest.approx({name: metrics[f"eval/{name}"] for name in losses}, rel=1e-6)
    (tmp_path / "mixed").mkdir()
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / "mixed" / name).write_text("{}\n")
    for path, message in (
        (tmp_path / "gone", f"--data {tmp_path / 'gone'}: there is no such file or folder"),
        (tmp_path / "mixed", "a.jsonl), text (b.txt): name the files in place of their folder"),
    ):
        command = Command(EVALUATE, [str(checkpoint), "--data", str(path)], {}, tmp_path / "printed.log")
        assert command.wait() == 2
        assert message in command.printed
