"""Benchmarks on one GPU: our trainer beside others on the same shapes, and decoding with a shared KV cache."""
