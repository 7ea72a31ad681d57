"""Scripts that run an exported folder in one engine, with that engine's own Python; they import nothing of ours."""
