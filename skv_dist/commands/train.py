"""``skv-train``: train from one YAML file, under plain python, torchrun or deepspeed alike."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skv_dist.config.load import dump_config, load_config
from skv_dist.config.run import Derived, RunConfig, derive
from skv_dist.errors import UserError, command

if TYPE_CHECKING:  # torch is imported once the configuration is known to be good
    from skv_dist.data.tokenizer import Tokenizer
    from skv_dist.parallel.processes.groups import World


def parse(argv: list[str]) -> RunConfig:
    parser = argparse.ArgumentParser(
        prog="skv-train",
        usage="skv-train CONFIG.yaml [section.key=value ...]\n       skv-train --explain [section.key]",
        description="Train from one YAML file, under plain python, torchrun or deepspeed alike.",
        epilog="Every key with its meaning and default: configs/reference.yaml, or python -m skv_dist.config.reference",
    )
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml", help="what the run is")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change keys of it, such as train.steps=100"
    )
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="section.key",
        help="say what a key means, or which keys a section has, and train nothing; without a key: the sections",
    )
    # Given by the deepspeed launcher; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.explain is not None:
        from skv_dist.config.explain import explain

        print(explain(arguments.explain))
        parser.exit()
    if arguments.config is None:
        parser.error("the following arguments are required: CONFIG.yaml")
    return load_config(arguments.config, arguments.overrides)


def claim(folder: Path, resume: str) -> None:
    """Make the run's folder; refuse to write over an earlier run unless this one goes on from it.

    Raises:
        UserError: ``folder`` holds a run, or cannot be written to.
    """
    if resume == "never" and (folder / "metrics.jsonl").exists():
        raise UserError(
            f"train.output_dir {folder} already holds a run and checkpoint.resume is 'never': choose another folder, "
            "move that one away or set checkpoint.resume=auto"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").touch()
    except OSError as error:
        raise UserError(f"train.output_dir {folder} cannot be written: {error.strerror}") from error


def train(run: RunConfig) -> None:
    """One run from start to end. Called on every process; leaves the process groups standing.

    Raises:
        UserError: whatever the user can mend.
    """
    from skv_dist.parallel.processes import groups

    derived = derive(run, groups.world_size_from_environment())
    # What can be told without the other processes is told before they meet.
    from skv_dist.data.tokenizer import load_tokenizer
    from skv_dist.model.megatron_config import transformer_impl

    transformer_impl(run)
    tokenizer = load_tokenizer(run.data.tokenizer)
    vocab_size = run.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size {vocab_size} is smaller than the {tokenizer.vocab_size} tokens of data.tokenizer "
            f"'{tokenizer.name}': raise it, or leave model.vocab_size out"
        )

    from skv_dist.parallel.processes.heartbeat import naming_lost_peers

    world = groups.start(run.parallel)
    with naming_lost_peers(run.parallel):
        _train(run, derived, tokenizer, vocab_size, world)


def _train(run: RunConfig, derived: Derived, tokenizer: "Tokenizer", vocab_size: int, world: "World") -> None:
    import torch.distributed as dist

    from skv_dist.checkpoint import folder as files
    from skv_dist.checkpoint import resume
    from skv_dist.checkpoint.save import Checkpoints, Saver, load, verify_everywhere
    from skv_dist.data.batches import open_data
    from skv_dist.evaluation.sweep import evaluation_batches, retention_plans, sweep
    from skv_dist.parallel.engines.create import create_engine
    from skv_dist.training.callbacks import Callback, Console, Evaluation, JsonLines, TensorBoard
    from skv_dist.training.report import software, start_report
    from skv_dist.training.trainer import Trainer

    out, checkpoints = Path(run.train.output_dir), Path(run.train.output_dir) / "checkpoints"
    samples, validation = open_data(run.data, tokenizer, run.train.seed, world.is_first, dist.barrier)
    if world.is_first:
        claim(out, run.checkpoint.resume)
        files.clean(checkpoints)
    start = resume.choose(run, checkpoints, tokenizer.fingerprint())
    engine = create_engine(run, vocab_size, world.device)
    trainer = Trainer(run, derived, world, engine, vocab_size, samples, [])
    if start is not None:
        load(engine, run, vocab_size, start, weights_only=False)
        trainer.restore(files.read_state(start))
    elif run.checkpoint.init_from is not None:
        verify_everywhere(Path(run.checkpoint.init_from))
        load(engine, run, vocab_size, Path(run.checkpoint.init_from), weights_only=True)

    def state() -> dict[str, Any]:
        layout = run.parallel.model_dump(mode="json")
        return {
            **trainer.state(),
            "tokenizer": tokenizer.fingerprint(),
            "software": software(),
            "layout": layout,
            "world_size": world.size,
        }

    saver = Saver(engine, run, vocab_size, checkpoints)
    callbacks: list[Callback] = []
    if run.eval.every and validation is not None:
        batches, plans = evaluation_batches(run, world, validation), retention_plans(run)
        callbacks.append(Evaluation(lambda: sweep(engine, run, world, batches, plans), run.eval.every, run.train.steps))
    callbacks.append(Checkpoints(saver, run.checkpoint.every, state))
    if world.is_first:
        (out / "config.yaml").write_text(dump_config(run), encoding="utf-8")
        files.truncate_metrics(out / "metrics.jsonl", trainer.step)
        print(start_report(run, derived, world, engine, vocab_size), flush=True)
        if start is not None:
            print(f"resumed from {start} at step {trainer.step}", flush=True)
        callbacks.append(JsonLines(out / "metrics.jsonl"))
        if run.train.tensorboard:
            callbacks.append(TensorBoard(out / "tensorboard"))
        if run.train.progress:
            callbacks.append(Console())
    trainer.callbacks = callbacks
    began = trainer.step
    trainer.fit()
    if run.checkpoint.at_end and trainer.step not in (began, saver.saved_step):
        saver.save(trainer.step, state())
    saver.close()
    engine.close()
    if trainer.stopped_by and world.is_first:
        print(f"stopped by {trainer.stopped_by} after step {trainer.step}", flush=True)


@command
def main(argv: list[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    train(parse(argv))

    from skv_dist.parallel.processes import groups

    groups.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
