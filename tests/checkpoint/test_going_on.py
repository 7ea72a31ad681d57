"""What a run goes on from where it cannot simply take the newest checkpoint, and that nothing is lost by it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.resume import check_same_model
from skv_dist.config.load import dump_config
from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from tests.support.jobs.checkpoint import run_and_report, run_at_home, run_where_files_cannot_be_read
from tests.support.runs import lines_of
from tests.support.settings import VOCAB_OF_BYTES, run_settings


def settings(text: Path, out: Path, **checkpoint: Any) -> dict[str, Any]:
    keep = {"every": 1, "keep_last": None, **checkpoint}
    return run_settings(text, out, checkpoint=keep, train={"steps": 4}, eval={"every": 0})


def steps(root: Path) -> list[int]:
    return [files.step_of(folder) for folder in files.existing(root)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(workers: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert workers(1)(run_and_report, settings(text, out), [])[0][1] is None
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_where_no_checkpoint_can_be_used_nothing_is_touched(workers: Any, text: Path, run: Path) -> None:
    for folder in files.existing(run / "checkpoints"):
        with (folder / "__0_0.distcp").open("r+b") as stream:
            stream.truncate(100)
    (run / "checkpoints" / ".step_00000009.writing").mkdir()
    before = contents(run)
    _, error = workers(1)(run_and_report, settings(text, run), [])[0]
    assert error is not None
    assert "no checkpoint in" in error
    for folder in files.existing(run / "checkpoints"):
        assert f"checkpoint {folder} is damaged: __0_0.distcp has 100 bytes" in error
    assert contents(run) == before


def test_an_error_of_the_file_system_is_not_damage(workers: Any, text: Path, run: Path) -> None:
    before = contents(run)
    printed, error = workers(1)(run_where_files_cannot_be_read, settings(text, run))[0]
    assert error is not None
    assert "cannot be read: Input/output error; start again once it can" in error
    assert "trying the one before" not in printed
    assert contents(run) == before


def test_checkpoints_that_are_gone_are_missed(workers: Any, text: Path, run: Path) -> None:
    for folder in files.existing(run / "checkpoints"):
        shutil.rmtree(folder)
    before = contents(run)
    _, error = workers(1)(run_and_report, settings(text, run), [])[0]
    assert error is not None
    assert "latest names a checkpoint, but" in error
    assert contents(run) == before


def test_strange_files_change_nothing(workers: Any, text: Path, run: Path) -> None:
    for folder in files.existing(run / "checkpoints"):
        (folder / ".DS_Store").touch()
        (folder / ".nfs000001").touch()
    printed, error = workers(1)(run_and_report, settings(text, run), [])[0]
    assert error is None
    assert f"resumed from {files.folder_of(run / 'checkpoints', 4)}" in printed


def test_a_damaged_checkpoint_neither_counts_nor_goes(workers: Any, text: Path, run: Path) -> None:
    """With one to keep, the damaged one, which has the highest step, must not push the new ones out."""
    root = run / "checkpoints"
    shutil.rmtree(files.folder_of(root, 3))
    (files.folder_of(root, 4) / "state.json").write_text("{}")
    printed, error = workers(1)(run_and_report, settings(text, run, keep_last=1), [4])[0]
    assert error is not None  # the last save failed
    assert "resumed from" in printed
    assert steps(root) == [3]
    assert (root / files.LATEST).read_text() == "step_00000003\n"
    assert (root / files.SUPERSEDED / "1" / "step_00000004" / "state.json").read_text() == "{}"


def test_rolling_back_keeps_what_is_new_and_what_was(workers: Any, text: Path, run: Path) -> None:
    root, before = run / "checkpoints", (run / "metrics.jsonl").read_text()
    asked = files.folder_of(root, 1)
    printed, error = workers(1)(run_and_report, settings(text, run, resume=str(asked), keep_last=2), [])[0]
    assert error is None
    assert f"resumed from {asked} at step 1" in printed
    assert steps(root) == [4, 3]
    assert (root / files.LATEST).read_text() == "step_00000004\n"
    apart = root / files.SUPERSEDED / "1"
    names = {path.name for path in apart.iterdir()}
    assert names == {"metrics.jsonl", "step_00000002", "step_00000003", "step_00000004"}
    assert (apart / "metrics.jsonl").read_text() == before
    for folder in apart.glob("step_*"):
        files.verify(folder)
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4]

    # Started again with the same key, it goes on from its own; that the one which was named is gone does not matter.
    shutil.rmtree(files.folder_of(root, 4))
    assert not asked.exists()
    printed, error = workers(1)(run_and_report, settings(text, run, resume=str(asked), keep_last=2), [])[0]
    assert error is None
    assert f"resumed from {files.folder_of(root, 3)} at step 3" in printed
    assert steps(root) == [4, 3]
    assert [path.name for path in (root / files.SUPERSEDED).iterdir()] == ["1"]
    state = json.loads((files.folder_of(root, 4) / "state.json").read_text())
    assert state["roll_backs"] == [str(asked)]


def test_starting_from_another_run(workers: Any, text: Path, finished: Path, run: Path) -> None:
    """None of the checkpoints that lie there leads to the one that is named."""
    asked = files.folder_of(finished / "checkpoints", 3)
    printed, error = workers(1)(run_and_report, settings(text, run, resume=str(asked)), [4])[0]
    assert error is not None
    assert f"resumed from {asked}" in printed
    assert steps(run / "checkpoints") == []
    assert len(list((run / "checkpoints" / files.SUPERSEDED / "1").glob("step_*"))) == 4
    assert steps(finished / "checkpoints") == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rope_theta": 1e6}, "model.rope_theta"),
        ({"norm_eps": 1e-5}, "model.norm_eps"),
        ({"num_layers": 4}, "model.num_layers"),
        ({"tie_embeddings": True}, "model.tie_embeddings"),
    ],
)
def test_weights_of_another_model_are_refused_by_key(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    def config(model: dict[str, Any], **checkpoint: Any) -> RunConfig:
        given = run_settings(tmp_path, tmp_path, model=model, checkpoint=checkpoint)
        return RunConfig.model_validate(given).for_vocabulary(VOCAB_OF_BYTES)

    (tmp_path / files.CONFIG).write_text(dump_config(config({})))
    (tmp_path / files.STATE).write_text(json.dumps({"vocab_size": VOCAB_OF_BYTES, "tokenizer": "bytes"}))
    free = {"hidden_dropout": 0.1, "max_position_embeddings": 4096, "init_std": 0.1, "make_vocab_size_divisible_by": 4}
    check_same_model("checkpoint.init_from", config(free), tmp_path, "bytes")
    with pytest.raises(UserError, match=f"holds another model: {key} was"):
        check_same_model("checkpoint.init_from", config(change), tmp_path, "bytes")
    check_same_model("checkpoint.init_from", config(change, allow_changed=[key]), tmp_path, "bytes")
    with pytest.raises(UserError, match=r"data\.tokenizer 'byte' is not the tokenizer"):
        check_same_model("checkpoint.init_from", config({}), tmp_path, "others")
    check_same_model("checkpoint.init_from", config({}, allow_changed=["data.tokenizer"]), tmp_path, "others")


def test_a_checkpoint_teaches(workers: Any, text: Path, finished: Path, tmp_path: Path) -> None:
    """Beginning with the teacher's own weights, the distance to it is what routing makes of them."""
    teacher = files.existing(finished / "checkpoints")[0]

    def divergences(name: str, **changed: Any) -> list[float]:
        given = settings(text, tmp_path / name, init_from=str(teacher)) | {"distillation": {"weight": 0.5}, **changed}
        printed, error = workers(1)(run_and_report, given, [])[0]
        assert error is None
        assert f"teacher:   {teacher}, weight 0.5" in printed
        return [line["teacher_kl"] for line in lines_of(tmp_path / name)]

    assert divergences("dense", routing={"policy": "none"})[0] == pytest.approx(0, abs=1e-6)
    routed = divergences("routed", routing={"policy": "r_cla", "cross_prob": 1.0})
    assert routed[0] > 1e-4
    # It goes on from its own checkpoint with the same teacher.
    shutil.rmtree(files.folder_of(tmp_path / "routed" / "checkpoints", 4))
    assert divergences("routed", routing={"policy": "r_cla", "cross_prob": 1.0})[-1] == routed[-1]


def test_a_teacher_that_cannot_teach_is_refused(workers: Any, text: Path, finished: Path, tmp_path: Path) -> None:
    teacher = files.existing(finished / "checkpoints")[0]
    given = settings(text, tmp_path / "run")
    with pytest.raises(UserError, match=r"neither distillation\.teacher nor checkpoint\.init_from names"):
        RunConfig.model_validate(given | {"distillation": {"weight": 1}})
    other = given | {
        "distillation": {"weight": 1, "teacher": str(teacher)},
        "model": {**given["model"], "num_layers": 4},
    }
    _, error = workers(1)(run_and_report, other, [])[0]
    assert error is not None
    assert f"distillation.teacher {teacher} holds another model: model.num_layers was 8 and is 4" in error
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_the_home_folder_is_found(workers: Any, text: Path, finished: Path, tmp_path: Path) -> None:
    """In ``train.output_dir`` and ``checkpoint.init_from``, as in data paths."""
    source = files.folder_of(finished / "checkpoints", 4)
    given = settings(text, Path("~/run"), init_from=f"~/{source.name}")
    (tmp_path / source.name).symlink_to(source)
    assert workers(1)(run_at_home, given, str(tmp_path))[0] is None
    assert steps(tmp_path / "run" / "checkpoints") == [4, 3, 2, 1]
