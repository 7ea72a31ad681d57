"""Benchmarks: other trainers on our shapes, and decoding with a shared KV cache."""
