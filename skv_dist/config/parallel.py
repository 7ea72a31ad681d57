"""``parallel``: how the run is spread over processes."""

from typing import Literal

from pydantic import Field, model_validator

from skv_dist.config.section import Section


class ParallelConfig(Section):
    """How the run is spread over processes. The number of processes is tensor x pipeline x replicas; the launcher
    starts them, and the number of data-parallel replicas follows. All of it may change between two parts of a run.
    skv-eval and skv-convert take one process unless they are told otherwise."""

    tensor: int = Field(default=1, gt=0)
    """Tensor-parallel size: number of processes over which each layer, embedding and head are split. 1: none. Must
    divide model.num_attention_heads and model.ffn_hidden_size. Best within one host."""

    sequence_parallel: bool = False
    """Whether norms and residual stream are split too, by position, over the tensor-parallel processes. Saves memory.
    Needs tensor above 1, which must divide data.sequence_length."""

    pipeline: int = Field(default=1, gt=0)
    """Number of pipeline stages. 1: no pipeline. The hidden state goes from stage to stage, and with it the K/V that
    later stages still read."""

    virtual_pipeline: int = Field(default=1, gt=0)
    """Number of separate chunks of layers on each pipeline stage. 1: the 1F1B schedule. Above 1: the interleaved
    schedule, in which stages wait less and send more; the number of micro-batches of a replica must then be a multiple
    of pipeline, and all transfers of a step are as wide as the widest. Needs pipeline above 1."""

    first_stage_layers: int | None = Field(default=None, gt=0)
    """Number of layers on the first stage, which also has the embedding. null: as many as on the others. Needs pipeline
    above 1."""

    last_stage_layers: int | None = Field(default=None, gt=0)
    """Number of layers on the last stage, which also has the head. null: as many as on the others. Needs pipeline above
    1."""

    engine: Literal["deepspeed", "fsdp"] = "deepspeed"
    """Whose sharding zero_stage asks for, where it is not 0. Either goes on from the other's checkpoints.

    - deepspeed: DeepSpeed's ZeRO optimizers.
    - fsdp: torch's fully_shard, whose stage 3 goes with a pipeline and with lora too."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over the data-parallel replicas (ZeRO). With one replica there is nothing to shard, and stages 1
    and 2 run as 0; with engine fsdp also 3.

    - 0: nothing; each replica holds everything.
    - 1: fp32 weights and optimizer state. Gradients of a step are summed whole and reduced once.
    - 2: gradients too, which are reduced in every micro-batch.
    - 3: the parameters too, which are gathered layer by layer. Refused with a pipeline where engine is deepspeed."""

    zero_bucket_mb: int = Field(default=256, gt=0)
    """Size in MiB of the pieces in which gradients are reduced, and parameters gathered. Larger pieces use the network
    better and take more memory. Read for all stages of ZeRO, 0 included; engine fsdp goes layer by layer instead."""

    overlap_comm: bool = False
    """Whether gradients are reduced while the backward pass goes on. Needs zero_stage 2 or 3. Engine fsdp always does
    so in these stages, and refuses the key."""

    timeout_minutes: float = Field(default=30, gt=0)
    """How long a process waits for the others before the run ends with an error. A process that has ended, that is
    stopped, or whose host has vanished, is named within a minute; one that gives no sign of life for another reason
    after half of this time."""

    @model_validator(mode="after")
    def _supported(self) -> "ParallelConfig":
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel: true needs tensor > 1: set parallel.sequence_parallel=false")
        if self.overlap_comm and self.engine == "fsdp":
            raise ValueError(
                "overlap_comm: true and engine: fsdp do not work together, as fsdp reduces beside the backward pass "
                "whenever it can: set parallel.overlap_comm=false"
            )
        if self.overlap_comm and self.zero_stage < 2:
            raise ValueError(
                f"overlap_comm: true needs zero_stage 2 or 3, not {self.zero_stage}, which reduces behind the "
                "backward pass: set parallel.overlap_comm=false or parallel.zero_stage=2"
            )
        if self.pipeline == 1:
            for key in ("virtual_pipeline", "first_stage_layers", "last_stage_layers"):
                if getattr(self, key) not in (None, 1):
                    raise ValueError(
                        f"{key} {getattr(self, key)} needs pipeline > 1: raise parallel.pipeline or leave it out"
                    )
        elif self.zero_stage == 3 and self.engine == "deepspeed":
            raise ValueError(
                f"zero_stage 3 and pipeline {self.pipeline} do not work together (DeepSpeed would gather parameters "
                "over all stages at once): set parallel.engine=fsdp, parallel.zero_stage=2 or parallel.pipeline=1"
            )
        return self

    @property
    def sequence_split(self) -> int:
        """Number of parts that hidden states are split into by position: t in shape comments."""
        return self.tensor if self.sequence_parallel else 1

    def stages(self, num_layers: int) -> tuple[range, ...]:
        """The layers of each stage in the order of execution.

        Stage i is chunk ``i // pipeline`` of pipeline rank ``i % pipeline``.

        Raises:
            ValueError: the layers cannot be cut that way; names the keys.
        """
        ends = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        given = {rank: layers for rank, layers in ends.items() if layers is not None}
        left, others = num_layers - sum(given.values()), self.pipeline - len(given)
        if left < others or (others and left % others) or (not others and left):
            shortened = " less those of first_stage_layers and last_stage_layers" if given else ""
            raise ValueError(
                f"model.num_layers {num_layers}{shortened} cannot be split evenly over {others} of parallel.pipeline "
                f"{self.pipeline} stages: change parallel.pipeline, or set parallel.first_stage_layers or "
                "parallel.last_stage_layers"
            )
        per_rank = [given.get(rank, left // max(1, others)) for rank in range(self.pipeline)]
        if any(layers % self.virtual_pipeline for layers in per_rank):
            raise ValueError(
                f"stages of {', '.join(map(str, per_rank))} layers cannot each be split evenly into "
                f"parallel.virtual_pipeline {self.virtual_pipeline} chunks: change one of them"
            )
        stages, begin = [], 0
        for _ in range(self.virtual_pipeline):
            for layers in per_rank:
                stages.append(range(begin, begin + layers // self.virtual_pipeline))
                begin = stages[-1].stop
        return tuple(stages)
