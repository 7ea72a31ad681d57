"""What runs long: ``python -m pytest tests/long``. The ordinary ``pytest`` leaves this folder out."""
