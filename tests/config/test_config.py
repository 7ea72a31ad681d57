"""Configuration files: the shipped ones, and one clear line for whatever is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from skv_dist.config.load import dump_config, load_config
from skv_dist.config.run import derive
from skv_dist.errors import UserError
from skv_dist.routing.found import FORMAT

CONFIGS = Path(__file__).parents[2] / "configs"
REFERENCE = CONFIGS / "reference.yaml"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_configurations_load(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tmp_path / "runs/finetune/initial.json"  # what finetune.yaml has skv-eval search write before
    found.parent.mkdir(parents=True)
    found.write_text(json.dumps({"format": FORMAT, "fingerprint": "", "order": list(range(30)), "budgets": []}))
    monkeypatch.chdir(tmp_path)
    load_config(file)


@pytest.mark.parametrize("shape", sorted((CONFIGS / "models").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_shapes_are_bases(shape: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        f"base: {shape}\ndata: {{sequence_length: 64, sources: [{{path: x, format: text}}]}}\n"
        "train: {steps: 1, output_dir: x, global_batch_size: 1, micro_batch_size: 1}\noptimizer: {lr: 1e-4}\n"
    )
    assert load_config(own).model.qk_norm == shape.name.startswith(("qwen3", "olmo", "gemma-3", "gemma4"))


def test_biases_are_the_same_in_any_order() -> None:
    one, other = (load_config(REFERENCE, [f"model.biases={given}"]) for given in ("[mlp, qkv, mlp]", "[qkv, mlp]"))
    assert one == other


def test_the_resolved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    run = load_config(REFERENCE, ["routing.cross_prob=[[0, 0.0], [10, 0.5]]", "optimizer.lr=1e-4"])
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(run))
    assert load_config(file) == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stps=3", "unknown key 'train.stps': did you mean 'steps'?"),
        ("train.lr=1e-4", "command line: unknown key 'train.lr': did you mean 'optimizer.lr'?"),
        ("train.zzz=3", "unknown key 'train.zzz': known keys are steps, epochs, seed, "),
        ("train.steps=-1", "command line: train.steps: Input should be greater than or equal to 0 (got -1)"),
        ("train.steps=0", "train.steps is missing, or 0, and train.epochs is not set: give one of the two"),
        ("train.steps=many", "train.steps"),
        ("parallel.zero_stage=4", "parallel.zero_stage"),
        ("model.block=gemma4", "block 'gemma4' does not go with activation 'swiglu': set activation=\"geglu\""),
        ("parallel.tensor=3", "model.num_attention_heads 4 is not divisible by parallel.tensor 3"),
        ("parallel.sequence_parallel=true", "needs tensor > 1"),
        ("parallel.pipeline=3", "model.num_layers 8 cannot be split evenly over 3 of parallel.pipeline 3 stages"),
        ("parallel.pipeline=2 parallel.zero_stage=3", "zero_stage 3 and pipeline 2 do not work together"),
        ("parallel.overlap_comm=true parallel.engine=fsdp", "overlap_comm: true and engine: fsdp do not work together"),
        (
            "parallel.engine=fsdp model.transformer_impl=transformer_engine",
            "parallel.engine: fsdp and model.transformer_impl: transformer_engine do not work together",
        ),
        ("parallel.overlap_comm=true parallel.zero_stage=1", "overlap_comm: true needs zero_stage 2 or 3, not 1"),
        ("parallel.virtual_pipeline=2", "virtual_pipeline 2 needs pipeline > 1"),
        ("parallel.first_stage_layers=2", "first_stage_layers 2 needs pipeline > 1"),
        ("parallel.pipeline=2 parallel.virtual_pipeline=3", "parallel.virtual_pipeline 3"),
        ("parallel.pipeline=2 parallel.first_stage_layers=3 parallel.last_stage_layers=4", "model.num_layers 8 less"),
        ("routing.policy=fixed routing.kv_source_layers=[0,0,0,0,0,0,0,0] routing.within_stage=true", "within_stage"),
        ("model.num_kv_heads=3", "num_kv_heads 3"),
        ("data.sequence_length=100000", "max_position_embeddings"),
        ("data.validation_fraction=0", "eval.every"),
        (
            "train.compile=true train.recompute=selective model.attention_dropout=0.1",
            "train.compile: true and model.attention_dropout 0.1 do not work together",
        ),
        ("train.micro_batch_size=5", "not divisible by train.micro_batch_size"),
        ("eval.retention=[0.5,0.501]", "differ in two decimals"),
        ("eval.retention=[1.5]", "eval.retention"),
        ("routing.policy=suffix routing.shared_layers=8", "shared_layers"),
        ("routing.cross_prob=1.5", "routing.cross_prob"),
        ("routing.kv_source_layers=[0]", "kv_source_layers"),
        ("optimizer.lr=-1", "optimizer.lr"),
        ("noequals", "section.key=value"),
        ("data.sources.1.path=x", "override 'data.sources.1.path=x': 'data.sources.1' does not exist"),
        ("data.sources.1=x", "override 'data.sources.1=x': 'data.sources' has no key '1'"),
        ("data.sources.0.pth=x", "unknown key 'data.sources.0.pth': did you mean 'path'?"),
        ("model.rope_scaling.fctor=2", "unknown key 'model.rope_scaling.fctor': did you mean 'factor'?"),
    ],
)
def test_bad_values_are_one_line_naming_the_key(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(REFERENCE, override.split(" "))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files_are_one_line_naming_file_and_line(tmp_path: Path) -> None:
    cases = {
        "model: {num_layers: 2\n": "not valid YAML",
        "- 1\n": "mapping of sections",
        "train:\n  steps: 1\n  steps: 2\n": "bad.yaml:3: not valid YAML: key 'steps' stands twice",
        "base: gone.yaml\n": "gone.yaml",
    }
    for text, message in cases.items():
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(UserError, match=r".") as caught:
            load_config(file)
        assert message in str(caught.value)
    missing = REFERENCE.read_text().replace("  hidden_size: 96 ", "  # hidden_size: 96 ")
    (tmp_path / "bad.yaml").write_text(missing)
    with pytest.raises(UserError, match=r"bad\.yaml:\d+: key 'model.hidden_size' is missing"):
        load_config(tmp_path / "bad.yaml")


def test_processes_must_fit_the_layout() -> None:
    run = load_config(REFERENCE, ["parallel.tensor=2"])
    assert derive(run, 4).data_parallel == 2
    with pytest.raises(UserError, match="start a multiple of 2 processes"):
        derive(run, 3)
    with pytest.raises(UserError, match="global_batch_size"):
        derive(run, 12)
    run = load_config(REFERENCE, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.micro_batch_size=32"])
    with pytest.raises(UserError, match=r"1 micro-batches of each replica to be a multiple of parallel\.pipeline 2"):
        derive(run, 2)


def test_the_command_prints_one_line_and_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "skv_dist.commands.train"]
    for arguments in (["nowhere.yaml"], [str(REFERENCE), "train.stps=1"]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr
