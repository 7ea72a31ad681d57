"""The whole run configuration, the checks that need more than one section, and what follows from it."""

import math
from dataclasses import dataclass

from pydantic import model_validator

from skv_dist.config.checkpoint import CheckpointConfig
from skv_dist.config.data import DataConfig
from skv_dist.config.distillation import DistillationConfig
from skv_dist.config.lora import LoraConfig
from skv_dist.config.model import ModelConfig
from skv_dist.config.parallel import ParallelConfig
from skv_dist.config.policy import build_policy, deployment_map
from skv_dist.config.routing import RoutingConfig
from skv_dist.config.section import Section
from skv_dist.config.train import EvalConfig, OptimizerConfig, TrainConfig
from skv_dist.errors import UserError
from skv_dist.routing.policies import Policy

_MANY = 10**6  # steps, while it is not known how many train.epochs are


class RunConfig(Section):
    model: ModelConfig
    routing: RoutingConfig = RoutingConfig()
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    optimizer: OptimizerConfig
    lora: LoraConfig = LoraConfig()
    distillation: DistillationConfig = DistillationConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _sections_fit(self) -> "RunConfig":
        model, parallel, train, data = self.model, self.parallel, self.train, self.data
        for key in ("num_attention_heads", "ffn_hidden_size"):
            if getattr(model, key) % parallel.tensor:
                raise UserError(
                    f"model.{key} {getattr(model, key)} is not divisible by parallel.tensor {parallel.tensor}: "
                    "choose a parallel.tensor that divides it"
                )
        larger, smaller = max(model.num_kv_heads, parallel.tensor), min(model.num_kv_heads, parallel.tensor)
        if larger % smaller:
            raise UserError(
                f"model.num_kv_heads {model.num_kv_heads} and parallel.tensor {parallel.tensor}: "
                "one must divide the other"
            )
        if model.block_style.qk_norm_over == "all_heads" and model.num_kv_heads < parallel.tensor:
            raise UserError(
                f"model.block '{model.block}', whose q/k-norms are over all heads, and parallel.tensor "
                f"{parallel.tensor} do not work together where model.num_kv_heads is {model.num_kv_heads}: lower "
                "parallel.tensor to it"
            )
        if parallel.sequence_parallel and data.sequence_length % parallel.tensor:
            raise UserError(
                f"data.sequence_length {data.sequence_length} is not divisible by parallel.tensor "
                f"{parallel.tensor}, which parallel.sequence_parallel needs: change one of them"
            )
        if data.sequence_length > model.max_position_embeddings:
            raise UserError(
                f"data.sequence_length {data.sequence_length} is greater than model.max_position_embeddings "
                f"{model.max_position_embeddings}: lower the first or raise the second"
            )
        if not train.steps and train.epochs is None:
            raise UserError("train.steps is missing, or 0, and train.epochs is not set: give one of the two")
        if train.epochs is not None and data.streaming:
            raise UserError(
                f"train.epochs {train.epochs:g} and data.streaming: true do not work together, as nobody knows how "
                "long a stream is: give train.steps in its place"
            )
        if train.global_batch_size % train.micro_batch_size:
            raise UserError(
                f"train.global_batch_size {train.global_batch_size} is not divisible by train.micro_batch_size "
                f"{train.micro_batch_size}"
            )
        if data.reset_attention and model.transformer_impl == "transformer_engine":
            raise UserError(
                "data.reset_attention: true and model.transformer_impl: transformer_engine do not work together: "
                "set model.transformer_impl=local"
            )
        if parallel.engine == "fsdp" and model.transformer_impl == "transformer_engine":
            raise UserError(
                "parallel.engine: fsdp and model.transformer_impl: transformer_engine do not work together: set "
                "model.transformer_impl=local"
            )
        repeats_core = train.recompute == "selective" and "core_attn" in train.recompute_modules
        if train.compile and model.attention_dropout and repeats_core:
            raise UserError(
                f"train.compile: true and model.attention_dropout {model.attention_dropout} do not work together where "
                "train.recompute: selective repeats core_attn, with other random numbers: set train.recompute=full"
            )
        if self.eval.every and data.validation_fraction == 0 and not data.validation_sources:
            raise UserError(
                f"eval.every is {self.eval.every}, but data.validation_fraction is 0 and there are no "
                "data.validation_sources: set eval.every=0 or hold out some text"
            )
        if self.lora.rank and parallel.zero_stage == 3 and parallel.engine == "deepspeed":
            raise UserError(
                f"lora.rank {self.lora.rank} and parallel.zero_stage 3 do not work together where parallel.engine is "
                "deepspeed: set parallel.engine=fsdp, or parallel.zero_stage=2 (adapters are small)"
            )
        if self.lora.rank and model.num_kv_heads < parallel.tensor:
            raise UserError(
                f"lora.rank {self.lora.rank} and parallel.tensor {parallel.tensor} do not work together where "
                f"model.num_kv_heads is {model.num_kv_heads}: lower parallel.tensor to it"
            )
        if self.distillation.weight and self.teacher is None:
            raise UserError(
                f"distillation.weight is {self.distillation.weight}, but neither distillation.teacher nor "
                "checkpoint.init_from names a checkpoint that teaches: name one, or set distillation.weight=0"
            )
        try:
            self.policy()  # refuses stages and policies that do not fit the layers
        except ValueError as error:
            raise UserError(str(error)) from error
        return self

    @property
    def vocab_size(self) -> int:
        """Number of tokens, without the rows that pad the embedding. Known once the tokenizer is: `for_vocabulary`."""
        if self.model.vocab_size is None:
            raise RuntimeError("model.vocab_size is not known yet: complete the configuration with for_vocabulary()")
        return self.model.vocab_size

    @property
    def teacher(self) -> str | None:
        """Folder of the checkpoint that teaches, where ``distillation.weight`` asks for one."""
        return self.distillation.teacher or self.checkpoint.init_from

    def for_vocabulary(self, num_tokens: int) -> "RunConfig":
        """The complete configuration: with the vocabulary of a tokenizer of ``num_tokens`` where none was given.

        Raises:
            UserError: ``model.vocab_size`` is given and has no place for all tokens.
        """
        size = num_tokens if self.model.vocab_size is None else self.model.vocab_size
        if size < num_tokens:
            raise UserError(
                f"model.vocab_size {size} is smaller than the {num_tokens} tokens of data.tokenizer "
                f"'{self.data.tokenizer}': raise it, or leave model.vocab_size out"
            )
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": size})})

    def for_sequences(self, number: int, step: int, position: int) -> "RunConfig":
        """The complete configuration: with the ``train.steps`` that ``train.epochs`` asks for, if it does.

        Args:
            number: training sequences of all sources.
            step: that the run goes on from; by then it had read ``position`` sequences.

        Raises:
            UserError: both are given and say two things.
        """
        epochs, batch = self.train.epochs, self.train.global_batch_size
        if epochs is None:
            return self
        steps = step + max(0, math.ceil((epochs * number - position) / batch - 1e-9)) or 1
        if self.train.steps not in (0, steps):
            raise UserError(
                f"train.steps {self.train.steps} and train.epochs {epochs:g} ({steps} steps of {batch} of the "
                f"{number:,} training sequences) say two things: leave one of them out"
            )
        return self.model_copy(update={"train": self.train.model_copy(update={"steps": steps})})

    @property
    def stages(self) -> tuple[range, ...]:
        """The layers of each pipeline stage, virtual stages included, in the order of execution."""
        return self.parallel.stages(self.model.num_layers)

    def sharing_map(self, retention: float) -> tuple[int, ...]:
        """The map under which a part ``retention`` of the cache is kept: uniform groups, or in a run with policy
        ``nested`` the first layers of its order.

        Raises:
            UserError: retention is not in (0, 1].
        """
        return deployment_map(self.routing, self.model.num_layers, retention, self.model.layer_kinds)

    def policy(self) -> Policy:
        """The routing policy over the layers of this model."""
        model = self.model
        return build_policy(self.routing, model.num_layers, self.stages, self.train.steps or _MANY, model.layer_kinds)


@dataclass(frozen=True)
class Derived:
    """Quantities computed once from the configuration and the number of processes, and shown at start."""

    world_size: int
    data_parallel: int
    num_micro_batches: int
    tokens_per_step: int


def derive(config: RunConfig, world_size: int) -> Derived:
    """Raises UserError where the processes do not fit the layout or the batch sizes."""
    parallel, train = config.parallel, config.train
    per_replica = parallel.tensor * parallel.pipeline
    if world_size % per_replica:
        raise UserError(
            f"{world_size} processes cannot hold parallel.tensor {parallel.tensor} x parallel.pipeline "
            f"{parallel.pipeline}: start a multiple of {per_replica} processes"
        )
    replicas = world_size // per_replica
    if train.global_batch_size % (train.micro_batch_size * replicas):
        raise UserError(
            f"train.global_batch_size {train.global_batch_size} is not divisible by train.micro_batch_size "
            f"{train.micro_batch_size} x {replicas} data-parallel replicas"
        )
    micro_batches = train.global_batch_size // (train.micro_batch_size * replicas)
    if parallel.virtual_pipeline > 1 and micro_batches % parallel.pipeline:
        raise UserError(
            f"parallel.virtual_pipeline {parallel.virtual_pipeline} needs the {micro_batches} micro-batches of each "
            f"replica to be a multiple of parallel.pipeline {parallel.pipeline}: change train.global_batch_size, "
            "train.micro_batch_size or the number of replicas"
        )
    return Derived(
        world_size=world_size,
        data_parallel=replicas,
        num_micro_batches=micro_batches,
        tokens_per_step=train.global_batch_size * config.data.sequence_length,
    )


def check_lanes(config: RunConfig, derived: Derived) -> None:
    """Raises UserError where the lanes of a stream cannot be dealt out to the replicas of a training run."""
    lanes, replicas = config.data.stream_lanes, derived.data_parallel
    if config.data.streaming and lanes % replicas:
        raise UserError(
            f"data.stream_lanes {lanes} cannot be shared out equally over {replicas} data-parallel replicas (processes "
            f"/ (parallel.tensor {config.parallel.tensor} x parallel.pipeline {config.parallel.pipeline})): set "
            f"data.stream_lanes to a multiple of {replicas} in a new run, or start a number of processes that fits"
        )
