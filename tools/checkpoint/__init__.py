"""``skv-checkpoint``: looking at the checkpoints of a run, taking weights out, removing old ones."""
