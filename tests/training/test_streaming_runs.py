"""Runs that stream their text: any layout like one process, and going on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from skv_dist.checkpoint import folder as files
from tests.support.checkpoints import END, HALF, assert_equal, resumed_run, whole_run
from tests.support.layouts import Layout
from tests.support.runs import losses
from tests.support.workers import JobFailedError

LAYOUTS = [
    Layout(replicas=2, zero_stage=2),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(tensor=2, replicas=2, zero_stage=1),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of rows, of unequal size."""
    folder = tmp_path_factory.mktemp("rows")
    for name, begin, end in (("a", 0, 30), ("b", 30, 200)):
        rows = (json.dumps({"text": f"row {number} " * (1 + number % 7)}) + "\n" for number in range(begin, end))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


def sections(source: Path, **data: Any) -> dict[str, Any]:
    given = {"streaming": True, "stream_lanes": 4, "shuffle_buffer": 12, "reset_attention": True, **data}
    return {"data": {"sources": [{"path": str(source), "format": "jsonl"}], **given}}


@pytest.fixture(scope="module")
def alone(workers: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("streamed") / "run"
    return out, whole_run(workers, source, out, Layout(), **sections(source))


def _figures(lines: list[dict[str, Any]]) -> list[float]:
    names = ("loss", "grad_norm", "eval/loss@1.00", "eval/loss@0.50")
    return [line[name] for line in lines for name in names if name in line]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_equal_one_process(
    workers: Any, source: Path, tmp_path: Path, layout: Layout, alone: tuple[Path, list[dict[str, Any]]]
) -> None:
    """One rank of each replica reads; the others hold what it read, or their losses would differ."""
    out, expected = alone
    found = whole_run(workers, source, tmp_path / "run", layout, **sections(source))
    assert _figures(found) == pytest.approx(_figures(expected), rel=2e-4)
    ours, theirs = (
        json.loads((files.folder_of(run / "checkpoints", END) / files.STREAM).read_text())
        for run in (tmp_path / "run", out)
    )
    assert ours == theirs


@pytest.mark.parametrize("layout", [Layout(replicas=2, zero_stage=1), Layout(pipeline=2)], ids=str)
def test_resuming_on_the_same_layout_is_bitwise(workers: Any, source: Path, tmp_path: Path, layout: Layout) -> None:
    expected = whole_run(workers, source, tmp_path / "whole", layout, **sections(source))
    found = resumed_run(workers, source, tmp_path / "whole", tmp_path / "resumed", layout, **sections(source))
    assert losses(found) == losses(expected)
    assert_equal(*(files.folder_of(tmp_path / run / "checkpoints", END) for run in ("resumed", "whole")))


def test_resuming_on_another_layout(
    workers: Any, source: Path, tmp_path: Path, alone: tuple[Path, list[dict[str, Any]]]
) -> None:
    out, expected = alone
    layout = Layout(tensor=2, replicas=2, zero_stage=1)
    found = resumed_run(workers, source, out, tmp_path / "resumed", layout, **sections(source))
    assert _figures(found) == pytest.approx(_figures(expected), rel=2e-4)


def test_a_row_that_cannot_be_read_ends_all_ranks_with_its_line(workers: Any, tmp_path: Path) -> None:
    """Only one of the two replicas comes to it."""
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [json.dumps({"text": f"row {number} " * 4}) for number in range(200)]
    rows[180] = "{"
    (folder / "a.jsonl").write_text("\n".join(rows) + "\n")
    given = sections(folder, shuffle_buffer=0, validation_fraction=0.0)
    with pytest.raises(
        JobFailedError, match=r"a\.jsonl' cannot be read as jsonl: line 181 is not a JSON object"
    ) as caught:
        whole_run(
            workers,
            folder,
            tmp_path / "run",
            Layout(replicas=2),
            **given,
            train={"steps": 40},
            eval={"every": 0},
        )
    assert caught.value.kind == "UserError"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2  # the steps before are recorded


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"does not say how far its stream was read.*checkpoint\.allow_changed=\[data\.stream_lanes\]"),
        ("{", r"is damaged: stream\.json is not what was written"),
        ('{"format": 1, "lanes": 4}', r"is damaged: stream\.json is not what was written"),
    ],
)
def test_without_its_place_in_the_stream_a_run_does_not_go_on(
    workers: Any,
    source: Path,
    tmp_path: Path,
    alone: tuple[Path, list[dict[str, Any]]],
    content: str | None,
    message: str,
) -> None:
    run = tmp_path / "run"
    folder = files.folder_of(run / "checkpoints", HALF)
    shutil.copytree(files.folder_of(alone[0] / "checkpoints", HALF), folder)
    (folder / files.STREAM).unlink()
    if content is not None:
        (folder / files.STREAM).write_text(content)
    (folder / files.MANIFEST).unlink()
    files.seal(folder, {path.name: files.digest(path) for path in folder.iterdir() if path.is_file()})
    with pytest.raises(JobFailedError, match=message):
        whole_run(workers, source, run, Layout(), **sections(source))


def test_lanes_that_replicas_cannot_share_out_are_refused(workers: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(JobFailedError, match=r"data\.stream_lanes 3 cannot be shared out equally over 2"):
        whole_run(workers, source, tmp_path / "run", Layout(replicas=2), **sections(source, stream_lanes=3))
