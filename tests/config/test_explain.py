"""``skv-train --explain``."""

import subprocess
import sys
from pathlib import Path

import pytest

from skv_dist.commands.train import parse
from skv_dist.config.explain import explain
from skv_dist.config.keys import field_at
from skv_dist.config.words import default_in_words, type_in_words
from skv_dist.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


def test_one_key() -> None:
    text = explain("optimizer.warmup_steps")
    assert text.startswith(
        "optimizer.warmup_steps\n  type:    integer at least 0, or null\n  default: null\n\n  Number"
    )
    assert "0: no warm-up." in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_section_lists_its_keys_by_their_first_sentences() -> None:
    text = explain("parallel")
    assert "How the run is spread over processes." in text
    lines = text.splitlines()
    assert "  pipeline            Number of pipeline stages." in lines
    assert not any("K/V that later stages" in line for line in lines)
    assert [name for name in explain("").split() if name in ("model", "routing", "checkpoint")][-1] == "checkpoint"
    assert "base" in explain("")


def test_nested_keys() -> None:
    assert "  factor " in explain("model.rope_scaling")
    assert "number at least 1" in explain("model.rope_scaling.factor")
    for key in ("data.sources.format", "data.sources.0.format", "data.validation_sources.3.format"):
        assert "  default: required, for example prepared\n" in explain(key)
    assert "paths relative to the file" in " ".join(explain("base").split())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.stps", "unknown key 'train.stps': did you mean 'steps'?"),
        ("trian.steps", "unknown key 'trian': did you mean 'train'?"),
        ("lr", "unknown key 'lr': did you mean 'optimizer.lr'?"),
        ("train.every", "unknown key 'train.every': did you mean 'eval.every' or 'checkpoint.every'?"),
        ("data.sources.pth", "unknown key 'data.sources.pth': did you mean 'path'?"),
        ("eval.zzz", "unknown key 'eval.zzz': known keys are every, samples, retention"),
        ("train.steps.x", "unknown key 'train.steps.x': 'train.steps' has no keys"),
        ("0", "unknown key '0': known keys are model, "),
        (".", "unknown key '': known keys are model, "),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        explain(key)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("key", "type_", "default"),
    [
        ("train.output_dir", "text", "required, for example runs/tiny"),
        ("train.compile", "true | false", "false"),
        ("model", "mapping", "required"),
        ("eval", "mapping", "every key has one"),
        ("model.norm", "rmsnorm | layernorm", "rmsnorm"),
        ("model.head_dim", "integer above 0, or null", "null"),
        ("model.rope_scaling", "mapping, or null", "null"),
        ("data.sources", "list of mappings, at least one", "required"),
        ("data.tokenizer", "text", "byte"),
        ("data.cache_dir", "text", "~/.cache/skv-dist"),
        ("data.validation_fraction", "number at least 0 and below 1", "0.01"),
        ("parallel.zero_stage", "0 | 1 | 2 | 3", "1"),
        ("routing.keep_probs", "uniform, or list of numbers from 0 to 1", "[1.0, 0.5, 0.25]"),
        ("routing.cross_prob", "number from 0 to 1, or list of [integer at least 0, number from 0 to 1]", "0.5"),
        ("train.recompute_modules", "list of core_attn | mlp", "[core_attn]"),
        ("eval.retention", "list of numbers above 0 and at most 1", "[1.0, 0.5, 0.33, 0.25]"),
    ],
)
def test_type_and_default_in_words(key: str, type_: str, default: str) -> None:
    field = field_at(key.split("."))
    assert field is not None
    assert (type_in_words(field), default_in_words(field)) == (type_, default)


def test_the_command_needs_no_configuration_and_no_torch() -> None:
    program = (
        "import sys\n"
        "from skv_dist.commands.train import main\n"
        "try:\n"
        "    code = main()\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        "assert 'torch' not in sys.modules\n"
        "raise SystemExit(code)\n"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)

    done = run("--explain", "train.steps")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == explain("train.steps") + "\n"
    done = run("--explain", "train.stps")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("error: unknown key 'train.stps': did you mean 'steps'?\n")
    assert done.stderr.count("\n") == 1


def test_launchers_may_put_their_option_anywhere() -> None:
    configuration, change = str(CONFIGS / "tiny.yaml"), "train.steps=7"
    for arguments in (["--local_rank=0", configuration, change], [configuration, change, "--local-rank", "0"]):
        assert parse(arguments).train.steps == 7


def test_help_points_at_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "skv-train --explain [section.key]" in text
    assert "configs/reference.yaml" in text
    with pytest.raises(SystemExit) as ended:
        parse([])
    assert ended.value.code == 2
    assert "CONFIG.yaml" in capsys.readouterr().err
