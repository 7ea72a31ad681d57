"""Benchmarks: training beside other trainers, pipelines, checkpoints, decoding with a shared cache, and engines."""
