"""The processes of a run: their groups, their signs of life, and Megatron-core on a CPU."""
