"""What the parity tests run inside worker processes, and the small configuration they start from."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

VOCAB = 101  # odd on purpose: padded differently for each tensor-parallel size
VOCAB_OF_BYTES = 259
SEQUENCE = 16
GLOBAL_BATCH = 8

BASE: dict[str, Any] = {
    "model": {
        "num_layers": 8,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "qk_norm": True,
        "make_vocab_size_divisible_by": 8,
        "transformer_impl": "local",
    },
    "routing": {"policy": "r_cla", "cross_prob": 0.6},
    "data": {"sequence_length": SEQUENCE, "sources": [{"path": "unused", "format": "text"}]},
    "train": {
        "steps": 3,
        "output_dir": "unused",
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": 2,
        "precision": "fp32",
        "seed": 7,
    },
    "optimizer": {"lr": 1e-2, "eps": 1e-4, "clip_grad_norm": 0.5, "weight_decay": 0.1},
}


def config(**sections: dict[str, Any]) -> dict[str, Any]:
    """BASE with keys of some sections replaced."""
    return {name: {**BASE.get(name, {}), **sections.get(name, {})} for name in {**BASE, **sections}}


def global_batch(step: int, reset_attention: bool = False, size: int = 2) -> list[Any]:
    """The micro-batches of one step, of ``size`` samples each. Some predictions do not count, unevenly."""
    from skv_dist.data.batches import collate
    from skv_dist.data.packing import Sample

    rng = np.random.default_rng(step)
    batches = []
    for index in range(GLOBAL_BATCH // size):
        samples = []
        for _ in range(size):
            tokens = rng.integers(0, VOCAB, SEQUENCE + 1)
            boundary = int(rng.integers(1, SEQUENCE))
            samples.append(Sample(tokens, (np.arange(SEQUENCE + 1) >= boundary).astype(np.int64)))
        batch = collate(index, samples, reset_attention)
        batch.loss_mask[0, : 2 * index] = 0
        batches.append(batch)
    return batches


@contextlib.contextmanager
def built(settings: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(run, world), with process groups that are left afterwards."""
    from skv_dist.config.run import RunConfig
    from skv_dist.parallel.processes import groups

    run = RunConfig.model_validate(settings)
    try:
        yield run, groups.start(run.parallel)
    finally:
        groups.leave_model_parallel()


@contextlib.contextmanager
def made_engine(run: Any, world: Any, vocab_size: int = VOCAB) -> Iterator[Any]:
    from skv_dist.parallel.engines.create import create_engine

    engine = create_engine(run, vocab_size, world.device)
    try:
        yield engine
    finally:
        engine.close()


def _capture_gradients(engine: Any, run: Any) -> dict[str, np.ndarray]:
    """Every gradient of the last batch, reduced, as the optimizer would get it.

    The optimizer's update is replaced by "parameter := gradient" for one step: whatever the ZeRO stage, full
    parameters then are full gradients, and no private attribute is read.
    """
    from skv_dist.parallel.engines.base import MODEL
    from tests.gather import full_parameters

    optimizer = engine.optimizer

    def take_gradient(closure: Any = None) -> None:
        import torch

        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.copy_(parameter.grad)

    def take_given(gradients: dict[Any, Any], scale: Any, applied: Any) -> None:
        for parameter, gradient in gradients.items():
            engine.write(parameter, MODEL, gradient.float() / scale)

    optimizer.step = take_gradient
    if getattr(engine, "_compiled", None) is not None:
        engine._compiled.step = take_given
    outcome = engine.step()
    gradients = {name: value.numpy().copy() for name, value in full_parameters(engine, run, VOCAB)}
    del optimizer.step
    return {"": np.float64(outcome.grad_norm), **gradients}


def train(
    settings: dict[str, Any], steps: int = 3, fault: str | None = None, without_clipping: bool = True
) -> dict[str, Any] | None:
    """Take the gradients of one batch, then, from the start again, train some steps on others.

    Rank 0 returns losses, gradient norms, gradients and the parameters at the end.

    Args:
        fault: name of a function in `tests.sabotage`.
        without_clipping: switch clipping off for the first batch, where it would hide a wrong scale of the gradient.
    """
    import torch

    from tests import sabotage

    # What an earlier job compiled, or gave up compiling, must not decide what this one runs.
    torch._dynamo.reset()
    with sabotage.applied(fault), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        return _train(settings, steps, without_clipping)


def _train(settings: dict[str, Any], steps: int, without_clipping: bool) -> dict[str, Any] | None:
    from tests.gather import full_parameters

    losses, norms = [], []
    with built(settings) as (run, world):
        with made_engine(run, world) as engine:
            losses.append(forward_backward(engine, run, world, steps))
            if without_clipping:
                unclip(engine)
            gradients = _capture_gradients(engine, run)
            norms.append(float(gradients.pop("")))
        with made_engine(run, world) as engine:
            engine.set_lr(run.optimizer.lr)
            for step in range(steps):
                losses.append(forward_backward(engine, run, world, step))
                norms.append(float(engine.step().grad_norm))
            parameters = {name: value.numpy().copy() for name, value in full_parameters(engine, run, VOCAB)}
        result = {"losses": losses, "norms": norms, "parameters": parameters, "gradients": gradients}
        return result if world.is_first else None


def forward_backward(engine: Any, run: Any, world: Any, step: int) -> float:
    """Gradients of the global batch of ``step``; its loss."""
    from skv_dist.parallel.processes.groups import seed_dropout
    from skv_dist.parallel.run_batch import count_tokens, run_batch
    from skv_dist.routing.draw import DrawKey

    batches = global_batch(step, run.data.reset_attention, run.train.micro_batch_size)
    mine = [batch for batch in batches if batch.index % world.data_size == world.data_rank]
    policy = run.policy()
    plans = [policy.plan(DrawKey(run.train.seed, step, b.index)) for b in mine]
    seed_dropout(run.train.seed, step, mine[0].index)
    tokens = count_tokens(mine)
    return run_batch(engine, run, mine, plans, tokens=tokens, train=True).loss.item()


def unclip(engine: Any) -> None:
    if hasattr(engine, "_clip"):
        engine._clip = 0.0
        return
    for name in ("clip_grad", "_clip_grad"):
        if hasattr(engine._zero, name):
            setattr(engine._zero, name, 0.0)


def logits(
    settings: dict[str, Any], weights: dict[str, np.ndarray] | None, tokens: np.ndarray, table: list[int]
) -> Any:
    """Logits [b, s, v] under a route table, of given weights (global names) or the initial ones."""
    import torch

    from skv_dist.parallel.engines.frozen import FrozenEngine
    from skv_dist.parallel.local_model import local_initial_values
    from skv_dist.parallel.tensor_split import kind_of, take
    from skv_dist.routing import RoutePlan

    with built(settings) as (run, world):
        vocab_size = run.model.vocab_size or VOCAB
        engine = FrozenEngine(run, vocab_size, world.device)
        if weights is None:
            engine.assign(local_initial_values(run, engine.root, vocab_size))
        else:
            assert weights.keys() == {name for name, _ in engine.root.named()}

            def part(name: str, local: Any) -> torch.Tensor:
                full = torch.from_numpy(weights[name])
                kind = kind_of(name, run.model.gated)
                return take(full, kind, world.tensor_rank, run.parallel.tensor, tuple(local.shape))

            engine.assign((p, part(name, p)) for name, p in engine.root.named())
        with torch.no_grad():
            out = engine.forward(0, RoutePlan(table), torch.from_numpy(tokens))
        return out.numpy().copy() if world.is_first else None


def run_training(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """`skv-train` without the command line; the lines of metrics.jsonl."""
    import json
    from pathlib import Path

    from skv_dist.commands.train import train
    from skv_dist.config.run import RunConfig
    from skv_dist.parallel.processes import groups

    try:
        train(RunConfig.model_validate(settings))
        lines = (Path(settings["train"]["output_dir"]) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]
    finally:
        groups.leave_model_parallel()


def steps_before_data_fail(settings: dict[str, Any], position: int) -> list[int]:
    """The steps that callbacks hear of where sample ``position`` cannot be read."""
    from skv_dist.config.run import derive
    from skv_dist.data.packing import Sample
    from skv_dist.errors import UserError
    from skv_dist.training.callbacks import Callback, Metrics
    from skv_dist.training.trainer import Trainer

    class Broken:
        def __getitem__(self, index: int) -> Sample:
            if index >= position:
                raise UserError(f"sample {index} is broken")
            return Sample(np.arange(SEQUENCE + 1), np.zeros(SEQUENCE + 1, np.int64))

    heard: list[int] = []

    class Listener(Callback):
        def on_step(self, step: int, metrics: Metrics) -> None:
            heard.append(step)

    with built(settings) as (run, world), made_engine(run, world) as engine:
        trainer = Trainer(run, derive(run, world.size), world, engine, VOCAB, Broken(), [Listener()])
        with contextlib.suppress(UserError):
            trainer.fit()
    return heard


def host_reads(settings: dict[str, Any]) -> int:
    """How often the host reads a tensor's value while it launches a step: on a GPU each is a wait.

    Compiled functions run as they are written.
    """
    from unittest import mock

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from skv_dist.config.run import derive
    from skv_dist.routing.draw import DrawKey
    from skv_dist.training.trainer import Trainer

    class Count(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def unchanged(function: Any = None, **_: Any) -> Any:
        return function or unchanged

    with (
        mock.patch("torch.compile", unchanged),
        mock.patch.object(torch.nn.Module, "compile", unchanged),
        built(settings) as (run, world),
        made_engine(run, world) as engine,
    ):
        trainer = Trainer(run, derive(run, world.size), world, engine, VOCAB, [], [])
        work = [(batch, run.policy().plan(DrawKey(0, 0, batch.index))) for batch in global_batch(0)]
        with Count() as count:
            trainer._launch(work, [])
    return count.reads


def leave_out(settings: dict[str, Any]) -> list[bool]:
    """Per check: a step left out changes no parameter, and leaves no gradient for the next one."""
    from skv_dist.parallel.run_batch import count_tokens, run_batch
    from skv_dist.routing import RoutePlan
    from tests.gather import full_parameters

    with built(settings) as (run, world), made_engine(run, world) as engine:

        def values() -> dict[str, np.ndarray]:
            return {name: value.numpy().copy() for name, value in full_parameters(engine, run, VOCAB)}

        def backward(step: int) -> None:
            mine = [b for b in global_batch(step) if b.index % world.data_size == world.data_rank]
            plans = [RoutePlan(range(run.model.num_layers))] * len(mine)
            run_batch(engine, run, mine, plans, tokens=count_tokens(mine), train=True)

        before = values()
        backward(0)
        outcome = engine.step(leave_out=True)
        after = values()
        unchanged = all(np.array_equal(before[name], after[name]) for name in before)
        backward(1)
        clean = engine.step()
        backward(1)
        moved = values()
        changed = any(not np.array_equal(before[name], moved[name]) for name in before)
        return [unchanged, not outcome.applied, clean.applied, changed, float(clean.grad_norm)]  # type: ignore[list-item]


def two_backwards(settings: dict[str, Any], with_hook: bool) -> list[float]:
    """Gradient norm of two micro-batches: both forwards before both backwards, then one after the other."""
    from skv_dist.routing import RoutePlan

    first, second = global_batch(0)[:2]

    def loss(engine: Any, batch: Any) -> Any:
        plan = RoutePlan(range(BASE["model"]["num_layers"]))
        return (engine.forward(0, plan, batch.tokens, batch.labels) * batch.loss_mask).sum()

    norms = []
    with built(settings) as (run, world):
        for together in (True, False):
            with made_engine(run, world) as engine:
                if not with_hook:
                    engine.root.on_backward = None
                if together:
                    losses = [loss(engine, first), loss(engine, second)]
                    for value in losses:
                        value.backward()
                else:
                    loss(engine, first).backward()
                    loss(engine, second).backward()
                norms.append(float(engine.step().grad_norm))
    return norms


def wire(settings: dict[str, Any]) -> dict[str, Any]:
    """One training batch: bytes sent by this rank, and the bytes of received K/V that it held at once (counted)."""
    import weakref
    from unittest import mock

    from skv_dist.model.chunk import RoutedChunk
    from skv_dist.parallel.run_batch import count_tokens, run_batch
    from skv_dist.routing.draw import DrawKey

    held: list[Any] = []
    most = 0
    right = RoutedChunk.take_input

    def counted(self: Any) -> Any:
        nonlocal most
        received = right(self)
        if received is not None:
            held.append(weakref.ref(received))
            alive = [tensor for tensor in (ref() for ref in held) if tensor is not None]
            hidden = self.config.hidden_size
            most = max(most, sum(t.nbytes - t.nbytes // t.shape[-1] * hidden for t in alive))
        return received

    with built(settings) as (run, world), made_engine(run, world) as engine:
        mine = [b for b in global_batch(0) if b.index % world.data_size == world.data_rank]
        policy = run.policy()
        plans = [policy.plan(DrawKey(run.train.seed, 0, b.index)) for b in mine]
        tokens = count_tokens(mine)
        with mock.patch.object(RoutedChunk, "take_input", counted):
            sent = run_batch(engine, run, mine, plans, tokens=tokens, train=True).wire_bytes
        return {"sent": sent, "held": most, "tables": [plan.table for plan in plans]}


def missing_source(settings: dict[str, Any]) -> str:
    """What a chunk says whose K/V did not come."""
    import torch

    from skv_dist.errors import UserError
    from skv_dist.model import chunk
    from skv_dist.routing import RoutePlan

    with built(settings) as (run, _):
        second = chunk.RoutedChunk(run, VOCAB, 5, 8)
        packed = torch.zeros(SEQUENCE, 2, run.model.hidden_size)
        try:
            second._run_layers(packed, {}, RoutePlan([0, 1, 2, 3, 4, 1, 6, 7]), None, None)  # type: ignore[arg-type]
        except UserError as error:
            return str(error)
        return ""


def read_and_write(settings: dict[str, Any], source: str, target: str) -> None:
    """Load a checkpoint into this layout and write it again at once, as step 1."""
    from pathlib import Path

    from skv_dist.checkpoint.save import Saver, load

    with built(settings) as (run, world), made_engine(run, world, VOCAB_OF_BYTES) as engine:
        load(engine, run, VOCAB_OF_BYTES, Path(source), weights_only=False)
        saver = Saver(engine, run, VOCAB_OF_BYTES, Path(target))
        saver.save(1, {})
        saver.close()


def run_and_print(settings: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """As `run_training`, with what was printed."""
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        return run_training(settings), printed.getvalue()


def run_on_a_full_disk(settings: dict[str, Any], step: int) -> tuple[list[dict[str, Any]], str]:
    """As `run_and_print`; writing the checkpoint of ``step`` fails once its tensors are on disk."""
    import errno
    from unittest import mock

    from skv_dist.checkpoint.save import Saver

    right = Saver._tensors

    def wrong(self: Any, folder: Any, *rest: Any) -> None:
        right(self, folder, *rest)
        if folder.name.endswith(f"{step:08d}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(Saver, "_tensors", wrong):
        return run_and_print(settings)
