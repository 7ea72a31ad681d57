"""Configurations that say how large the vocabulary is, which a run may leave to its tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from skv_dist.checkpoint.folder import read_state
from skv_dist.checkpoint.frozen_model import config_of
from skv_dist.config.model import ModelConfig
from skv_dist.config.run import RunConfig


def completed_config(checkpoint: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a checkpoint over one process, with the vocabulary that the run had.

    Raises:
        UserError: ``checkpoint`` is none, or is damaged.
    """
    run = config_of(checkpoint, overrides)
    model = run.model.model_copy(update={"vocab_size": int(read_state(checkpoint)["vocab_size"])})
    return run.model_copy(update={"model": model})


def vocab_size(model: ModelConfig) -> int:
    """Of a model that was read from a checkpoint or from a Hugging Face folder."""
    assert model.vocab_size is not None
    return model.vocab_size
