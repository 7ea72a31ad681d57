"""``checkpoint``: what a run leaves on disk, and what it starts from."""

from pydantic import Field, model_validator

from skv_dist.config.section import Section


class CheckpointConfig(Section):
    """What a run leaves in train.output_dir/checkpoints, and what it starts from. A checkpoint can be read by any
    layout (the parallel section), whichever wrote it."""

    every: int = Field(default=0, ge=0)
    """Number of steps between checkpoints. 0: by time, see every_minutes."""

    every_minutes: float = Field(default=15.0, ge=0)
    """Minutes between checkpoints where every is 0, by the clock of the first process. 0: none but that of at_end."""

    at_end: bool = True
    """Whether a checkpoint is written when training ends. That is after the last step, or after the step in which
    SIGTERM came. If it cannot be written, the run ends with an error."""

    keep_last: int | None = Field(default=2, gt=0)
    """How many of the newest checkpoints are kept. Older ones are deleted once a new one is complete. null: all are
    kept."""

    keep_every: int | None = Field(default=None, gt=0)
    """Checkpoints whose step is a multiple of this are kept beside the newest. null: no others are."""

    resume: str = Field(default="auto", min_length=1)
    """What the run goes on from: auto, never, or the folder of a checkpoint.

    - auto: the newest complete checkpoint in train.output_dir, or the start if there is none. A damaged one is named
      and passed over; if all are damaged, the run does not start.
    - never: the start. A train.output_dir that holds a run is refused.
    - a folder, such as runs/one/checkpoints/step_00000100: this checkpoint, which must be whole. Checkpoints in
      train.output_dir that do not lead to it move to checkpoints/superseded. Started again with the same value, the run
      goes on from the newest that it has written since."""

    allow_changed: list[str] = []
    """Keys that may differ from those of the checkpoint that the run goes on from. For example [train.steps,
    routing.cross_prob]. Any other change of the model, routing, data or optimizer section, or of steps, seed, batch
    sizes and precision in train, is refused; keys that change no result (data.cache_dir and the like) are free."""

    init_from: str | None = None
    """Folder of a checkpoint whose weights the run begins with (fine-tuning): step 0 and a new optimizer. null: weights
    are drawn at random. Its model section and tokenizer must be this run's, but for what allow_changed names and for
    dropout, init_std and max_position_embeddings. Read only where the run does not go on from a checkpoint of its own;
    needs resume auto or never."""

    async_save: bool = True
    """Whether a thread writes the files while training goes on. false: training waits until the checkpoint is
    complete."""

    @model_validator(mode="after")
    def _one_start(self) -> "CheckpointConfig":
        if self.init_from is not None and self.resume not in ("auto", "never"):
            raise ValueError(
                f"init_from '{self.init_from}' and resume '{self.resume}' both name what to start from: "
                "set checkpoint.resume=auto or leave checkpoint.init_from out"
            )
        return self
