"""A checkpoint that was made to do harm: every command that reads one refuses it, and nothing is executed."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.security.conftest import settings
from tests.security.crafted import CRAFTS, Craft, Touch, crafted, sealed
from tests.support.jobs.commands import NO_ENGINE, outcome_of
from tests.support.processes import Command

TRAIN, EVALUATE = "skv_dist.commands.train", "skv_dist.commands.evaluate"
CHECKPOINT, CONVERT = "skv_tools.checkpoint.cli", "skv_tools.convert.cli"
Reader = Callable[[Path, Path], tuple[str, list[str]]]  # from the checkpoint and a folder for files to a command


@pytest.fixture(scope="module")
def readers(text: Path, words: Path, exported: Path, questions: Path) -> dict[str, Reader]:
    """Every command that reads a checkpoint."""

    def train(**sections: dict[str, Any]) -> Callable[[Path], tuple[str, list[str]]]:
        def command(out: Path) -> tuple[str, list[str]]:
            file = out / "run.yaml"
            file.write_text(yaml.safe_dump(settings(text, words, out / "run", **sections)))
            return TRAIN, [str(file)]

        return command

    def simple(module: str, *arguments: object) -> Reader:
        def command(folder: Path, out: Path) -> tuple[str, list[str]]:
            places = {"FOLDER": folder, "OUT": out / "made"}
            return module, [str(places.get(str(argument), argument)) for argument in arguments]

        return command

    return {
        "resume": lambda folder, out: train(checkpoint={"resume": str(folder)})(out),
        "init_from": lambda folder, out: train(checkpoint={"init_from": str(folder)})(out),
        "teacher": lambda folder, out: train(distillation={"teacher": str(folder), "weight": 0.5})(out),
        "skv-eval": simple(EVALUATE, "FOLDER", "--retention", 1.0),
        "questions": simple(
            EVALUATE, "questions", "FOLDER", questions, "--prompt-field", "question", "--answers-field", "answer"
        ),
        "inspect": simple(CHECKPOINT, "inspect", "FOLDER", "--tensors"),
        "export": simple(CHECKPOINT, "export", "FOLDER", "OUT"),
        "to-hf": simple(CONVERT, "to-hf", "FOLDER", "OUT", "--no-verify"),
        "verify": simple(CONVERT, "verify", "FOLDER", exported),
    }


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Path]:
    """The file that a crafted checkpoint would make."""
    yield (file := tmp_path / "executed.jinja")
    assert not file.exists()


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() or path.is_fifo()}


# What a reader has no use for, and so does not look at.
UNREAD = {
    "a_tensor_is_a_command": {"inspect"},
    "the_configuration_is_a_command": {"inspect", "export"},
    "the_configuration_names_another_file": {"inspect", "export"},
    "a_template_is_to_be_written_elsewhere": {"resume", "init_from", "teacher", "inspect", "export", "verify"},
}
DONE = ("ended", "0"), ("refused", NO_ENGINE)


@pytest.mark.parametrize("craft", CRAFTS, ids=lambda craft: craft.__name__)
def test_every_reader_refuses_it(
    workers: Any, whole: Path, readers: dict[str, Reader], tmp_path: Path, made: Path, craft: Craft
) -> None:
    folder = crafted(whole, tmp_path / "step_00000001", craft, made)
    for name, reader in readers.items():
        out = tmp_path / name
        out.mkdir()
        module, arguments = reader(folder, out)
        given = files_in(out)
        ((end, said),) = workers(1)(outcome_of, module, arguments)
        assert not made.exists(), name
        if name in UNREAD.get(craft.__name__, ()):
            assert (end, said) in DONE, name
            continue
        assert end == "refused", (name, said)
        assert CRAFTS[craft] in said, name
        assert {path for path in files_in(out) if ".lock" not in path.name} == given, name


@pytest.mark.parametrize("craft", [c for c in CRAFTS if "command" in c.__name__], ids=lambda craft: craft.__name__)
def test_they_would_be_executed(whole: Path, tmp_path: Path, craft: Craft) -> None:
    """By who reads them without care, or the test above would show nothing."""
    made = tmp_path / "executed"
    folder = crafted(whole, tmp_path / "step_00000001", craft, made)
    if "configuration" in craft.__name__:
        yaml.unsafe_load((folder / "config.yaml").read_text())
    elif "metadata" in craft.__name__:
        pickle.loads((folder / ".metadata").read_bytes())
    else:
        import torch.distributed.checkpoint as dcp

        (place,) = {
            (info.offset, info.length)
            for index, info in dcp.FileSystemReader(folder).read_metadata().storage_data.items()
            if index.fqn == "model.final_norm.weight"
        }
        with (folder / "__0_0.distcp").open("rb") as stream:
            stream.seek(place[0])
            (tmp_path / "payload").write_bytes(stream.read(place[1]))
        torch.load(tmp_path / "payload", weights_only=False)
    assert made.exists()


def test_a_command_says_one_line_and_fails(whole: Path, readers: dict[str, Reader], tmp_path: Path, made: Path) -> None:
    """As processes, all at once: what `entry_point` makes of a refusal."""
    craft = next(craft for craft in CRAFTS if craft.__name__ == "a_tensor_is_called_bytes")
    folder = crafted(whole, tmp_path / "step_00000001", craft, made)
    for name, reader in readers.items():
        out = tmp_path / name
        out.mkdir()
        module, arguments = reader(folder, out)
        command = Command(module, arguments, {}, out / "stdout", out / "stderr")
        assert command.wait() == 2, command.printed
        assert (out / "stderr").read_text().count("\n") == 1, (out / "stderr").read_text()
        assert CRAFTS[craft] in (out / "stderr").read_text()


def test_pickles_beside_the_tensors_are_left_alone(
    workers: Any, whole: Path, readers: dict[str, Reader], tmp_path: Path, made: Path
) -> None:
    """Other programs keep optimizers, engines and arrays there; nothing of ours reads such files."""
    folder = tmp_path / "step_00000001"
    shutil.copytree(whole, folder)
    for name in (
        *("common.pt", "optimizer.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin", "latest"),
        *("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "tokenizer/vocab.pkl"),
    ):
        torch.save(Touch(made), folder / name)
    np.save(folder / "tokens.npy", np.array([Touch(made)], dtype=object), allow_pickle=True)
    sealed(folder)
    for name, reader in readers.items():
        out = tmp_path / name
        out.mkdir()
        assert workers(1)(outcome_of, *reader(folder, out))[0] in DONE, name
        assert not made.exists(), name


def test_code_beside_the_tokenizer_is_left_alone(
    workers: Any, whole: Path, readers: dict[str, Reader], tmp_path: Path, made: Path
) -> None:
    folder = tmp_path / "step_00000001"
    shutil.copytree(whole, folder)
    (folder / "tokenizer" / "evil.py").write_text(f"import os\nos.system('touch {made}')\nclass Evil: pass\n")
    file = folder / "tokenizer" / "tokenizer_config.json"
    settings = {**json.loads(file.read_text()), "tokenizer_class": "Evil"}
    file.write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    sealed(folder)
    for name, reader in readers.items():
        out = tmp_path / name
        out.mkdir()
        workers(1)(outcome_of, *reader(folder, out))
        assert not made.exists(), name


def test_links_may_lead_to_plain_files_only(
    workers: Any, whole: Path, readers: dict[str, Reader], tmp_path: Path
) -> None:
    """The cache of a hub is made of links; one to a device would be read without end."""
    folder = tmp_path / "step_00000001"
    shutil.copytree(whole, folder)
    os.rename(folder / "state.json", tmp_path / "state.json")
    (folder / "state.json").symlink_to(tmp_path / "state.json")
    assert workers(1)(outcome_of, *readers["inspect"](folder, tmp_path))[0] == ("ended", "0")
    (folder / "state.json").unlink()
    (folder / "state.json").symlink_to("/dev/zero")
    end, said = workers(1)(outcome_of, *readers["inspect"](folder, tmp_path))[0]
    assert end == "refused"
    assert "state.json is no plain file" in said
