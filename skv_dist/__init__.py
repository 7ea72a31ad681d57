"""skv-dist: train language models whose KV cache can be cut in depth at deployment (arXiv 2604.22782)."""

__version__ = "0.1.0"
