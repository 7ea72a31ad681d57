"""``distillation``: learning from a teacher beside the text."""

from pydantic import Field

from skv_dist.config.section import Section


class DistillationConfig(Section):
    """Learning from a teacher: the same model with its whole cache, whose predictions a routed model is to keep. What
    is minimized is (1 - weight) times the loss on the text plus weight times KL(teacher || model), in nats per
    prediction that counts. The cure where routing a finished model costs it quality (docs/finetuning.md)."""

    weight: float = Field(default=0.0, ge=0, le=1)
    """How much of the objective is the distance to the teacher, the rest being the loss on the text. 0: no teacher.
    The teacher runs over each micro-batch without gradient, which costs about a third more time, and its weights lie
    beside the model's, split by parallel.tensor and parallel.pipeline, and by ZeRO only in stage 3 of parallel.engine
    fsdp."""

    teacher: str | None = Field(default=None, min_length=1)
    """Folder of the checkpoint that teaches, with the full cache. null: that of checkpoint.init_from, so that the model
    stays close to what it began as. Its model section and tokenizer must be this run's."""
