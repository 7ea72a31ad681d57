"""Fine-tuning of a real model from end to end, with the commands that a user types.

The model is that of `test_real_model`. ``SKV_QUESTIONS`` may name a file of questions (fields context, question and
answers, as FairytaleQA has them); without it they are made here.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.long.test_real_model import folder  # noqa: F401
from tests.tools.convert.conftest import call  # noqa: F401
from tests.tools.convert.hf_models import Call

PROMPT = "{context}\n\nQuestion: {question}\nAnswer:"
NUMBER, NEW = 8, 12
ORDER = [0, 1, 20, 16, 2, 18, 19, 17, 24, 5, 15, 9, 23, 8, 11, 13, 26, 14, 4, 12, 22, 21, 28, 25, 6, 29, 10, 27, 7, 3]


def questions(out: Path) -> Path:
    if "SKV_QUESTIONS" in os.environ:
        rows = [json.loads(line) for line in Path(os.environ["SKV_QUESTIONS"]).read_text().splitlines()]
        rows = sorted(rows, key=lambda row: len(row["context"]))[:200]  # which a processor reads in minutes
    else:
        rows = [
            {
                "context": f"A {animal} lived near the {place}. One day it found a {thing} and took it home.",
                "question": f"What did the {animal} find?",
                "answers": [f"a {thing}"],
            }
            for animal in ("fox", "hen", "wolf", "goat", "mouse")
            for place in ("river", "forest", "mill", "castle")
            for thing in ("golden ring", "key", "red shoe", "loaf of bread")
        ]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def command(module: str, *arguments: object) -> str:
    line = [sys.executable, "-m", f"skv_dist.commands.{module}", *map(str, arguments)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def onnx_tokens(exported: Path, prompt: list[int]) -> list[int]:
    import onnxruntime_genai as og

    model = og.Model(str(exported))
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=len(prompt) + NEW, do_sample=False)
    generator = og.Generator(model, options)
    generator.append_tokens(prompt)
    while not generator.is_done() and len(generator.get_sequence(0)) < len(prompt) + NEW:
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def test_from_a_model_to_answers_in_three_engines(
    call: Call,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = questions(tmp_path / "questions.jsonl")
    assert call("from-hf", folder, tmp_path / "start", "--no-verify") == 0  # test_real_model compares
    source = {"path": str(file), "format": "jsonl", "prompt_field": PROMPT, "response_field": " {answers}"}
    run = tmp_path / "run"
    config = tmp_path / "run.yaml"
    config.write_text(
        json.dumps(
            {
                "base": str(tmp_path / "start" / "model.yaml"),
                "data": {
                    "sequence_length": 256,
                    "reset_attention": True,
                    "tokenizer": str(folder),
                    "validation_fraction": 0.1,
                    "sources": [source],
                },
                "routing": {"policy": "nested", "order": ORDER, "start": 0.0, "ramp": 0.0},
                "optimizer": {"lr": 3e-4},
                "train": {
                    "steps": 20,
                    "global_batch_size": 2,
                    "micro_batch_size": 2,
                    "precision": "fp32",
                    "compile": False,
                    "output_dir": str(run),
                },
                "eval": {"every": 0},
                "checkpoint": {"init_from": str(tmp_path / "start"), "every": 20},
            }
        )
    )
    command("train", config)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert math.isfinite(json.loads(lines[-1])["loss"])

    shares = ("1", "0.5", "0.25")
    asked = ["--answers-field", "answers", "--number", NUMBER, "--new-tokens", NEW, "--retention", *shares]
    command("evaluate", "questions", run, file, *asked, "--json", tmp_path / "scores.json")
    scores: dict[str, Any] = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores) == ["1.00", "0.50", "0.25"]

    assert call("to-hf", run, tmp_path / "half", "--retention", 0.5) == 0
    assert call("to-onnx", tmp_path / "half", tmp_path / "onnx") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "half", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", trust_remote_code=True, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in file.read_text().splitlines()][:NUMBER]
    for row, answer in zip(rows, scores["0.50"]["answers"], strict=True):
        prompt = tokenizer(PROMPT.format(**row))["input_ids"]
        said = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
        assert answer["text"] == first_line(tokenizer.decode(said, skip_special_tokens=True))
        without_end = [token for token in said if token != model.generation_config.eos_token_id]
        assert onnx_tokens(tmp_path / "onnx", prompt)[: len(without_end)] == without_end  # which leaves the end out


def first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()
