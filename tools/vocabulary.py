"""The size of a vocabulary that is known: the ``model`` section may leave it to the tokenizer of a run."""

from skv_dist.config.model import ModelConfig


def vocab_size(model: ModelConfig) -> int:
    """Of a model that was read from a checkpoint, from a Hugging Face folder or from a shape that gives it."""
    assert model.vocab_size is not None
    return model.vocab_size
