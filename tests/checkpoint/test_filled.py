"""Every element of every parameter comes from the checkpoint, or the start is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.load import read_tensors
from skv_dist.errors import UserError
from tests.support.checkpoints import END, HALF, changed, resumed_run, small_run
from tests.support.jobs.checkpoint import read_and_write
from tests.support.jobs.initial_values import computed_without_values, trained_without_drawing
from tests.support.layouts import SMALL, Layout
from tests.support.runs import lines_of
from tests.support.settings import config
from tests.support.workers import JobFailedError

NAME = "model.layers.1.mlp.linear_fc2.weight"


def without_a_chunk(metadata: Any, folder: Path) -> None:
    del metadata.state_dict_metadata[NAME].chunks[-1]


def with_a_chunk_cut(metadata: Any, folder: Path) -> None:
    chunks = metadata.state_dict_metadata[NAME].chunks
    rows, columns = chunks[-1].sizes
    chunks[-1] = ChunkStorageMetadata(chunks[-1].offsets, torch.Size([rows - 1, columns]))


def with_a_chunk_twice(metadata: Any, folder: Path) -> None:
    chunks = metadata.state_dict_metadata[NAME].chunks
    chunks.append(chunks[-1])


def without_the_tensor(metadata: Any, folder: Path) -> None:
    del metadata.state_dict_metadata[NAME]
    metadata.storage_data = {place: info for place, info in metadata.storage_data.items() if place.fqn != NAME}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_chunk, f"is damaged: .metadata knows where [0-9]+ of [0-9]+ elements of '{NAME}' lie"),
        (with_a_chunk_cut, f"is damaged: .metadata knows where [0-9]+ of [0-9]+ elements of '{NAME}' lie"),
        (with_a_chunk_twice, f"is damaged: .metadata knows where [0-9]+ of [0-9]+ elements of '{NAME}' lie"),
        (without_the_tensor, f"does not fit this model, or is damaged: .*{NAME}"),
    ],
)
def test_what_is_not_stored_in_full_is_refused(
    workers: Any, text: Path, finished: Path, tmp_path: Path, change: Callable[..., None], message: str
) -> None:
    source = files.folder_of(finished / "checkpoints", END)
    folder = changed(source, tmp_path / source.name, change)
    layout = Layout(replicas=2, zero_stage=2)
    with pytest.raises(JobFailedError, match=f"{folder} {message}"):
        workers(2)(read_and_write, small_run(text, tmp_path, layout), str(folder), str(tmp_path / "again"))
    if change is not without_the_tensor:
        with pytest.raises(UserError, match=message):
            read_tensors(folder, [NAME])


@pytest.mark.parametrize("parallel", [{"zero_stage": 0}, {"zero_stage": 3}], ids=str)
def test_nothing_is_computed_before_every_weight_has_a_value(workers: Any, parallel: dict[str, Any]) -> None:
    (messages,) = workers(1)(computed_without_values, config(model=SMALL, parallel=parallel))
    assert messages[0] is not None
    assert "parameters have no value yet, such as embedding.weight" in messages[0]
    assert messages[1] == "1 parameters have no value yet, such as final_norm.weight"
    assert messages[2] is None


@pytest.mark.parametrize("layout", [Layout(replicas=2, zero_stage=1), Layout(replicas=2, zero_stage=3)], ids=str)
def test_a_run_that_resumes_draws_nothing(
    workers: Any, text: Path, finished: Path, tmp_path: Path, layout: Layout
) -> None:
    found = resumed_run(workers, text, finished, tmp_path / "out", layout, job=trained_without_drawing)
    assert [line["loss"] for line in found[:HALF]] == [line["loss"] for line in lines_of(finished)[:HALF]]
    assert len(found) == END
    with pytest.raises(JobFailedError, match="initial values were drawn"):
        workers(2)(trained_without_drawing, small_run(text, tmp_path / "new", layout))
