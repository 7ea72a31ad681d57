"""lm-evaluation-harness on a checkpoint: its figures are those of a plain model, in one process and in several."""

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from skv_tools.convert.from_hf import from_hf
from tokenizers.processors import TemplateProcessing

from skv_dist.checkpoint import folder as files
from skv_dist.checkpoint.frozen_model import config_of
from skv_dist.checkpoint.load import read_tensors, tensor_shapes
from skv_dist.data.tokenizer import ByteTokenizer, load_tokenizer
from tests.data.test_chats import CHATML, tokenizer_in
from tests.model.plain import routed_logits
from tests.support.harness import (
    DOCUMENTS,
    LONGEST,
    NEW,
    UNTIL,
    flat,
    needs_lm_eval,
    of_all,
    run_harness,
    without_stock_tasks,
    write_tasks,
)
from tests.support.jobs.loop import run_training
from tests.support.processes import Command
from tests.support.runs import EVALUATE
from tests.support.settings import run_settings
from tests.tools.convert.hf_models import make, save

STEPS, LAYERS = 40, 4
MAPS = {"1.00": (0, 1, 2, 3), "0.50": (0, 0, 2, 2)}
tokenizer = ByteTokenizer()


@pytest.fixture(scope="module")
def checkpoint(workers: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that has learned some words."""
    out = tmp_path_factory.mktemp("harness") / "run"
    given = run_settings(
        text,
        out,
        model={"num_layers": LAYERS, "max_position_embeddings": LONGEST},
        routing={"policy": "subset", "keep_probs": [1.0, 0.5]},
        train={"steps": STEPS},
        eval={"every": 0},
        optimizer={"lr": 0.02},
    )
    workers(1)(run_training, given)
    return files.folder_of(out / "checkpoints", STEPS)


class Plain:
    """The model of a checkpoint under one map, in fp64, a whole forward for each request."""

    def __init__(self, checkpoint: Path, table: tuple[int, ...]) -> None:
        names = [name for name in tensor_shapes(checkpoint) if name.startswith("model.")]
        read = read_tensors(checkpoint, names)
        self._weights = {name.removeprefix("model."): value.double() for name, value in read.items()}
        self._model, self._table = config_of(checkpoint).model, table

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """[s, V]"""
        logits = routed_logits(self._weights, self._model, torch.tensor([ids]), self._table)
        return logits[0, :, : tokenizer.vocab_size].log_softmax(-1)

    def likelihood(self, before: list[int], after: list[int]) -> tuple[float, bool]:
        ids = (before + after)[-LONGEST - 1 :]
        log_probs = self.log_probs(ids[:-1])[-len(after) :]
        labels = torch.tensor(after)
        return log_probs.gather(1, labels[:, None]).sum().item(), bool((log_probs.argmax(-1) == labels).all())

    def of_whole(self, text: str) -> float:
        """Each token once, behind as much as the model can see: the last window is full."""
        ids, total, done = [tokenizer.end_of_document, *encode(text)], 0.0, 1
        while done < len(ids):
            end = min(done + LONGEST, len(ids))
            total += self.likelihood(ids[max(0, end - LONGEST - 1) : done], ids[done:end])[0]
            done = end
        return total

    def say(self, before: str) -> str:
        ids = encode(before)[-(LONGEST - NEW) :] or [tokenizer.end_of_document]
        said: list[int] = []
        while len(said) < NEW:
            token = int(self.log_probs(ids + said)[-1].argmax())
            if token == tokenizer.end_of_document:
                break
            said.append(token)
        text = tokenizer.decode(said)
        for end in UNTIL:
            text = text.split(end)[0]
        return text


def encode(text: str) -> list[int]:
    return tokenizer.encode(text).tolist()


@pytest.fixture(scope="module")
def alone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Any]:
    """One process, which knows the tasks of lm_eval too."""
    return of_all(tmp_path_factory.mktemp("alone"), checkpoint, first=None)


@needs_lm_eval
@pytest.mark.parametrize("name", MAPS)
def test_likelihoods_and_answers_are_those_of_a_plain_model(
    checkpoint: Path, alone: tuple[list[str], Any], name: str
) -> None:
    plain, found = Plain(checkpoint, MAPS[name]), alone[1][name]
    right = 0
    for sample in found["samples"]["skv_choice"]:
        document, expected = sample["doc"], []
        for choice in document["choices"]:
            before = document["before"].rstrip()
            after = document["before"][len(before) :] + choice
            expected.append(plain.likelihood(encode(before) or [tokenizer.end_of_document], encode(after)))
        answers = [answer for ((answer,),) in zip(sample["resps"])]
        assert [log_prob for log_prob, _ in answers] == pytest.approx([log_prob for log_prob, _ in expected], abs=1e-4)
        assert [is_greedy for _, is_greedy in answers] == [is_greedy for _, is_greedy in expected]
        right += max(range(len(expected)), key=expected.__getitem__) == document["right"]
    assert found["results"]["skv_choice"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))
    texts = [document["before"] + document["choices"][0] for document in DOCUMENTS]
    scores = [plain.of_whole(text) for text in texts]
    assert [sample["resps"][0][0] for sample in found["samples"]["skv_text"]] == pytest.approx(scores, abs=1e-4)
    perplexity = math.exp(-sum(scores) / sum(map(len, texts)))
    assert found["results"]["skv_text"]["byte_perplexity,none"] == pytest.approx(perplexity)
    said = [sample["resps"][0][0] for sample in found["samples"]["skv_said"]]
    assert said == [plain.say(document["before"]) for document in DOCUMENTS]
    assert {len(answer) == NEW for answer in said} == {True, False}  # some were cut


@needs_lm_eval
def test_maps_differ_and_are_shown_side_by_side(alone: tuple[list[str], Any]) -> None:
    (printed,), found = alone
    assert list(found) == list(MAPS)
    whole, half = found.values()
    assert whole["cache_bytes_per_token"] == 2 * half["cache_bytes_per_token"]
    assert whole["results"]["skv_text"] != half["results"]["skv_text"]
    assert "1.00" in printed.splitlines()[0]
    assert "2 of 4" in printed
    values = [found[name]["results"]["skv_choice"] for name in MAPS]
    shown = [f"{value['acc,none']:.4f} ± {value['acc_stderr,none']:.4f}" for value in values]
    (line,) = [line for line in printed.splitlines() if line.split()[:2] == ["skv_choice", "acc"]]
    assert [cell for cell in shown if cell in line] == shown


@needs_lm_eval
@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, []),
        (2, ["parallel.tensor=2", "parallel.sequence_parallel=true"]),
        (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
        (4, ["parallel.pipeline=2"]),
    ],
    ids=str,
)
def test_several_processes_find_the_same(
    checkpoint: Path, alone: tuple[list[str], Any], tmp_path: Path, processes: int, layout: list[str]
) -> None:
    printed, found = of_all(tmp_path, checkpoint, *layout, processes=processes)
    for name, expected in alone[1].items():
        for task, metrics in expected["results"].items():
            assert found[name]["results"][task] == pytest.approx(metrics, abs=1e-5), task
        for task, samples in expected["samples"].items():
            for ours, theirs in zip(found[name]["samples"][task], samples, strict=True):
                assert flat(ours["resps"]) == pytest.approx(flat(theirs["resps"]), abs=1e-4)
    assert printed[0] == alone[0][0]
    assert not any(printed[1:])


@needs_lm_eval
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="lm_eval's own model needs accelerate")
@pytest.mark.parametrize("chat", [False, True])
def test_figures_are_those_of_lm_eval_on_the_original(tmp_path: Path, chat: bool) -> None:
    """A Llama with a tokenizer that puts a token before each text."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = save(make("llama"), tmp_path / "hf")
    save_tokenizer(folder)
    from_hf(folder, tmp_path / "ours", None)
    _, found = of_all(tmp_path, tmp_path / "ours", *(["--chat"] if chat else []))
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=str(folder), device="cpu", dtype="float32"),
        tasks=["skv_all"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    for task, samples in theirs["samples"].items():
        for ours, sample in zip(found["1.00"]["samples"][task], samples, strict=True):
            assert ours["doc_id"] == sample["doc_id"]
            answers = json.loads(json.dumps(sample["resps"]))
            assert flat(ours["resps"]) == pytest.approx(flat(answers), abs=1e-4)


def save_tokenizer(folder: Path) -> None:
    """Bytes, with a template, and a token before each text."""
    made = tokenizer_in(folder, CHATML).stock
    made.add_special_tokens({"bos_token": "<|im_start|>"})
    before = ("<|im_start|>", made.convert_tokens_to_ids("<|im_start|>"))
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[before])
    made.save_pretrained(folder)
    assert load_tokenizer(str(folder)).begin_of_document == before[1]


@needs_lm_eval
def test_limit_and_examples_are_passed_on(checkpoint: Path, tmp_path: Path) -> None:
    tasks = ["--tasks", "skv_cho*", "--include-path", str(write_tasks(tmp_path)), "--log-samples"]
    _, found = run_harness(tmp_path, checkpoint, *tasks, "--limit", "2", "--num-fewshot", "1")
    samples = [found[name]["samples"]["skv_choice"] for name in MAPS]
    assert [len(of_map) for of_map in samples] == [2, 2]
    prompts = [[sample["arguments"][0][0] for sample in of_map] for of_map in samples]
    assert prompts[0] == prompts[1]  # each map sees the same examples
    assert all("\n\n" in prompt for prompt in prompts[0])


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "generation", "message"),
    [
        (["skv_chioce"], {}, "lm_eval has no task 'skv_chioce': did you mean skv_choice"),
        (["skv_gone"], {}, "skv_gone cannot be loaded: "),
        (["skv_said"], {"do_sample": True}, "task 'skv_said': a task asks for sampled text (do_sample: true)"),
        (["skv_said"], {"num_beams": 4}, "task 'skv_said': a task's generation_kwargs ask for num_beams"),
        (["skv_said"], {"max_gen_toks": LONGEST}, f"{LONGEST} new tokens (max_gen_toks), which leave no room"),
        (["skv_said", "--chat"], {}, "data.tokenizer 'byte' has no chat template: leave --chat out"),
        (["skv_said", "--limit", "0"], {}, "--limit must be at least 1, got 0"),
        (["skv_said", "--log-samples"], {}, "--log-samples writes to the file of --json"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, arguments: list[str], generation: dict[str, Any], message: str
) -> None:
    tasks = write_tasks(tmp_path, **generation)
    gone = {"task": "skv_gone", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "gone.jsonl")}}
    (tasks / "gone.yaml").write_text(json.dumps(gone))
    refused(tmp_path, ["harness", str(checkpoint), "--include-path", str(tasks), "--tasks", *arguments], message)


def test_without_the_package_the_cure_is_named_at_once(tmp_path: Path) -> None:
    given = ["harness", str(tmp_path / "no checkpoint"), "--tasks", "arc_easy"]
    refused(tmp_path, given, "pip install 'skv-dist[harness]'", first=hide_lm_eval)


def hide_lm_eval() -> None:
    sys.modules["lm_eval"] = None  # type: ignore[assignment]  # so importing it fails


def refused(folder: Path, given: list[str], message: str, first: Callable[[], None] = without_stock_tasks) -> None:
    command = Command(EVALUATE, given, {}, folder / "printed.log", first=first)
    assert command.wait() == 2, command.printed
    assert message in command.printed
    assert "Traceback" not in command.printed
    assert len(command.printed.strip().splitlines()[-1].split("error: ")) == 2
