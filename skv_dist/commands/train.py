"""``skv-train``: train from one YAML file, under plain python, torchrun or deepspeed alike."""

import argparse
import contextlib
import os
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from skv_dist.commands.arguments import ArgumentParser
from skv_dist.commands.entry_point import INTERRUPTED, entry_point
from skv_dist.config.evaluations import check_best, check_questions
from skv_dist.config.load import load_config
from skv_dist.config.run import Derived, RunConfig, check_lanes, derive
from skv_dist.errors import UserError

if TYPE_CHECKING:  # torch is imported once the configuration is known to be good
    from skv_dist.checkpoint.save import Saver
    from skv_dist.data.continuing import Validation
    from skv_dist.data.open import Blend
    from skv_dist.data.stream import TrainingStream
    from skv_dist.data.tokenizer import Tokenizer
    from skv_dist.parallel.processes.groups import World
    from skv_dist.parallel.teacher import Teacher
    from skv_dist.training.callbacks import Best, Callback
    from skv_dist.training.report import Parameters
    from skv_dist.training.stop import StopRequest
    from skv_dist.training.trainer import Trainer


def parse(argv: list[str]) -> RunConfig:
    parser = ArgumentParser(
        prog="skv-train",
        usage="skv-train CONFIG.yaml [section.key=value ...]\n       skv-train --explain [section.key]",
        description="Train from one YAML file, under plain python, torchrun or deepspeed alike.",
        epilog="example: skv-train configs/tiny.yaml train.steps=100 train.output_dir=runs/tiny. Every key with its "
        "meaning and default: configs/reference.yaml, or python -m skv_dist.config.reference",
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


def train(run: RunConfig) -> signal.Signals | None:
    """One run from start to end. Called on every process; leaves the process groups standing.

    Returns:
        The signal that ended it early, if one did: the same on all processes.

    Raises:
        UserError: whatever the user can mend.
    """
    from skv_dist.data.tokenizer import load_tokenizer
    from skv_dist.model.megatron_config import check_device, transformer_impl
    from skv_dist.parallel.processes import groups, launcher
    from skv_dist.parallel.processes.heartbeat import naming_lost_peers
    from skv_dist.training.stop import StopRequest

    # What can be told without the other processes is told before they meet.
    derived = derive(run, launcher.world_size())
    check_lanes(run, derived)
    check_best(run)
    check_questions(run)
    _check_packages(run)
    check_device(run)
    transformer_impl(run)
    tokenizer = load_tokenizer(run.data.tokenizer)
    run = run.for_vocabulary(tokenizer.vocab_size)
    world = groups.start(run.parallel)
    with naming_lost_peers(run.parallel), StopRequest() as stop:
        return _train_in_world(run, derived, tokenizer, world, stop)


def _check_packages(run: RunConfig) -> None:
    found = None if run.train.wandb is None else find_spec("wandb")
    if run.train.wandb is not None and (found is None or found.origin is None):  # a folder called wandb is no package
        raise UserError(
            f"train.wandb is '{run.train.wandb}', but the package wandb is not installed: pip install "
            "'skv-dist[wandb]', or set train.wandb=null"
        )


class RunData(NamedTuple):
    """What a run reads, and what its checkpoints note of it."""

    samples: "Blend | TrainingStream"
    validation: "Validation"
    state: dict[str, Any]


def _train_in_world(
    run: RunConfig, derived: Derived, tokenizer: "Tokenizer", world: "World", stop: "StopRequest"
) -> signal.Signals | None:
    from skv_dist.checkpoint import resume
    from skv_dist.checkpoint.folder import read_state
    from skv_dist.data.stream import TrainingStream
    from skv_dist.training import output_folder
    from skv_dist.training.lock import FolderLock

    out = output_folder.folder_of(run)
    start = resume.choose(run, out / output_folder.CHECKPOINTS, tokenizer.fingerprints())
    data = _open_data(run, derived, tokenizer, start)
    if not isinstance(data.samples, TrainingStream):
        state = {} if start is None else read_state(start)
        run = run.for_sequences(data.samples.num_sequences, state.get("step", 0), state.get("samples", 0))
    is_new = world.is_first and not out.exists()
    _claim(out, run, world)
    lock = FolderLock(out)
    try:
        return _train_in_folder(run, derived, tokenizer, world, stop, start, data)
    finally:
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):
                out.rmdir()  # where the start was refused: it is empty


def _open_data(run: RunConfig, derived: Derived, tokenizer: "Tokenizer", start: Path | None) -> RunData:
    """The data of the run; that of the checkpoint ``start``, if it goes on from one."""
    from skv_dist.checkpoint.folder import read_config, read_state
    from skv_dist.checkpoint.load import read_stream
    from skv_dist.data.continuing import check_goes_on, data_state, restore_stream
    from skv_dist.data.open import open_data
    from skv_dist.data.split import SplitRule, rule_of
    from skv_dist.parallel.processes.agree import on_first_rank
    from skv_dist.parallel.processes.rendezvous import wait_for_all

    allowed = run.checkpoint.allow_changed
    rule = SplitRule.CONTENT if start is None else rule_of(read_state(start), run.data, allowed)
    samples, validation = open_data(
        run.data,
        tokenizer,
        run.train.seed,
        wait_for_all,
        rule=rule,
        validation_needed=run.eval.every > 0,
        once=on_first_rank,
        micro_batch_size=run.train.micro_batch_size,
        replicas=derived.data_parallel,
    )
    if start is not None:
        state, stream = read_state(start), read_stream(start)
        before = read_config(start).data
        check_goes_on(state, before, run.data, samples, validation, allowed, has_stream=stream is not None)
        restore_stream(samples, stream, state, tokenizer)
    return RunData(samples, validation, data_state(rule, samples, validation))


def _claim(out: Path, run: RunConfig, world: "World") -> None:
    """Make the output folder, on the first rank; what is wrong with it all ranks say."""
    from skv_dist.parallel.processes.agree import first_error
    from skv_dist.training import output_folder

    error = None
    if world.is_first:
        try:
            output_folder.claim(out, run.checkpoint.resume)
        except UserError as problem:
            error = str(problem)
    if (agreed := first_error(error)) is not None:
        raise UserError(agreed)


def _train_in_folder(
    run: RunConfig,
    derived: Derived,
    tokenizer: "Tokenizer",
    world: "World",
    stop: "StopRequest",
    start: Path | None,
    data: RunData,
) -> signal.Signals | None:
    from skv_dist.checkpoint import resume
    from skv_dist.checkpoint.save import Saver
    from skv_dist.checkpoint.travelling import end_tokens, origin_of, travelling_files
    from skv_dist.parallel.engines.create import create_engine
    from skv_dist.training import output_folder
    from skv_dist.training.report import count_parameters
    from skv_dist.training.trainer import Trainer
    from skv_dist.versions import software

    out = output_folder.folder_of(run)
    begin_with = None if start is not None else resume.checked_weights(run, tokenizer.fingerprints())
    teacher_folder = resume.checked_teacher(run, tokenizer.fingerprints())
    from_scratch = start is None and begin_with is None
    engine = create_engine(run, world.device, initialize=from_scratch)
    teacher = None if teacher_folder is None else _teacher(run, teacher_folder, world)
    trainer = Trainer(run, derived, world, engine, data.samples, teacher)
    _restore(trainer, start, begin_with)
    roll_backs = resume.roll_backs(run, start)
    travelling = travelling_files(tokenizer, start or begin_with) if world.is_first else {}
    saver = Saver(trainer.engine, run, out / output_folder.CHECKPOINTS, travelling)

    def state() -> dict[str, Any]:
        return {
            **trainer.state(),
            **({} if best is None else {"best": best.state()}),
            "roll_backs": roll_backs,
            "tokenizer": tokenizer.fingerprint(),
            "data": data.state,
            "software": software(),
            "layout": run.parallel.model_dump(mode="json"),
            "world_size": world.size,
        }

    best = _best(run, start, world)
    weights = start or begin_with
    ends = frozenset(end_tokens({} if weights is None else origin_of(weights), tokenizer))
    callbacks = _callbacks(trainer, saver, state, data.validation, best, tokenizer, ends)
    parameters = count_parameters(run, engine)
    if world.is_first:
        output_folder.begin(out, run, trainer.step, start)
        _announce(trainer, parameters, start, begin_with)
    first_step = trainer.step
    try:
        trainer.fit(callbacks, stop)
    except UserError:
        saver.finish_pending()
        raise
    saver.wait()
    if run.checkpoint.at_end and trainer.step not in (first_step, saver.saved_step):
        saver.save(trainer.step, state())
    saver.close()
    trainer.close()
    trainer.engine.close()
    _report_end(trainer, saver, callbacks, start)
    return trainer.stopped_by


def _teacher(run: RunConfig, folder: Path, world: "World") -> "Teacher":
    from skv_dist.checkpoint.folder import read_config
    from skv_dist.checkpoint.load import load_checkpoint
    from skv_dist.parallel.engines.create import create_teacher
    from skv_dist.parallel.teacher import Teacher

    own = run.model_copy(update={"lora": read_config(folder).lora})
    engine = create_teacher(own, world.device)
    load_checkpoint(engine, own, folder, weights_only=True)
    return Teacher(engine, run.distillation.weight)


def _report_end(trainer: "Trainer", saver: "Saver", callbacks: list["Callback"], start: Path | None) -> None:
    """How the run ended.

    Raises:
        UserError: something of it is not on disk.
    """
    from skv_dist.parallel.processes.agree import first_error

    lost = first_error(next((callback.stop_reason for callback in callbacks if callback.stop_reason), None))
    problems = [] if lost is None else [f"{lost}; the run was ended after step {trainer.step}"]
    if saver.failure is not None:
        last = f"step {saver.saved_step}" if saver.saved_step is not None else start or "the start"
        problems.append(f"{saver.failure}: what was trained after {last} is lost")
    if problems:
        raise UserError(f"{'; '.join(problems)}; mend that and start the run again")
    if trainer.stopped_by and trainer.world.is_first:
        print(f"stopped by {trainer.stopped_by.name} after step {trainer.step}", flush=True)


def _restore(trainer: "Trainer", start: Path | None, begin_with: Path | None) -> None:
    """Go on from the checkpoint ``start``, or else begin with the weights of ``begin_with``, if any."""
    from skv_dist.checkpoint.folder import read_config, read_state
    from skv_dist.checkpoint.load import load_checkpoint
    from skv_dist.model.adapter import is_adapter
    from skv_dist.parallel.initial_values import local_initial_values

    run, engine = trainer.run, trainer.engine
    if start is not None:
        load_checkpoint(engine, run, start, weights_only=False)
        trainer.restore(read_state(start))
    elif begin_with is not None:
        if run.lora.rank and not read_config(begin_with).lora.rank:  # new adapters on what was trained without
            engine.assign(local_initial_values(run, engine.model, is_adapter))
            load_checkpoint(engine, run, begin_with, weights_only=True, left_out=is_adapter)
        else:
            load_checkpoint(engine, run, begin_with, weights_only=True)


def _best(run: RunConfig, start: Path | None, world: "World") -> "Best | None":
    """What notes the best evaluation, where ``eval.best`` asks for it."""
    from skv_dist.checkpoint.folder import read_state
    from skv_dist.training.callbacks import Best

    if run.eval.best is None:
        return None
    best = Best(run.eval.best, run.eval.patience, says_so=world.is_first)
    best.restore(None if start is None else read_state(start).get("best"))
    return best


def _callbacks(
    trainer: "Trainer",
    saver: "Saver",
    state: Callable[[], dict[str, Any]],
    validation: "Validation",
    best: "Best | None",
    tokenizer: "Tokenizer",
    ends: frozenset[int],
) -> list["Callback"]:
    """In the order in which they see a step: what measures, what saves, and on the first rank what records."""
    from skv_dist.checkpoint.folder import METRICS, TENSORBOARD
    from skv_dist.evaluation.questions import ask_while_training
    from skv_dist.evaluation.sweep import check_measured, evaluation_batches, retention_plans, sweep
    from skv_dist.training.callbacks import Callback, Checkpoints, Console, Evaluation, JsonLines, TensorBoard
    from skv_dist.training.output_folder import folder_of
    from skv_dist.training.weights_and_biases import WeightsAndBiases

    run, world, engine = trainer.run, trainer.world, trainer.engine
    callbacks: list[Callback] = []
    if run.eval.every and validation is not None:
        batches, plans = evaluation_batches(run, world, validation), retention_plans(run)
        check_measured(run.eval.best, run, batches, validation.names)
        evaluate = [lambda: sweep(engine, run, batches, plans, validation.names)]
        if run.eval.questions is not None:
            by_size = {name.removeprefix("loss@"): plan for name, plan in plans.items()}
            asked = run.eval.questions
            evaluate.append(ask_while_training(asked, engine, run, world, tokenizer, ends, by_size))
        callbacks.append(Evaluation(evaluate, run.eval.every, run.train.steps))
    if best is not None:
        callbacks.append(best)
    callbacks.append(Checkpoints(saver, run.checkpoint.every, state, lambda: trainer.save_due, best))
    if world.is_first:
        out = folder_of(run)
        callbacks.append(JsonLines(out / METRICS))
        if run.train.tensorboard:
            callbacks.append(TensorBoard(out / TENSORBOARD))
        if run.train.wandb is not None:
            callbacks.append(WeightsAndBiases(run.train.wandb, out, run.model_dump(mode="json")))
        if run.train.progress:
            callbacks.append(Console())
    return callbacks


def _announce(trainer: "Trainer", parameters: "Parameters", start: Path | None, begin_with: Path | None) -> None:
    from skv_dist.checkpoint.folder import read_config
    from skv_dist.training.report import start_report

    begins = (
        f"with the weights of {begin_with}" if begin_with else f"with random weights, seed {trainer.run.train.seed}"
    )
    if start is not None:
        begins = f"with step {trainer.step} of {start}"
    run, derived, world = trainer.run, trainer.derived, trainer.world
    print(start_report(run, derived, world, parameters, begins, trainer.num_sequences), flush=True)
    if start is not None:
        print(f"resumed from {start} at step {trainer.step}", flush=True)
        steps, before = trainer.run.train.steps, read_config(start).train.steps
        if trainer.step >= steps:
            print(
                f"this run is finished: all of its {steps} steps are done; to train on, raise train.steps", flush=True
            )
        elif 0 < before < steps:
            print(
                f"train.steps grew from {before} to {steps}: the learning rate, and what routing gives as a part of "
                "it, follow the longer schedule from here on",
                flush=True,
            )


@entry_point
def main(argv: list[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stopped_by = train(parse(argv))

    from skv_dist.parallel.processes import groups

    groups.stop()
    return INTERRUPTED if stopped_by == signal.SIGINT else 0


if __name__ == "__main__":
    raise SystemExit(main())
