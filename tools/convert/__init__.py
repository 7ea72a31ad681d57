"""``skv-convert``: Hugging Face folders to checkpoints and back."""
