"""What runs an exported model in each inference engine, importing nothing of skv_dist.

`skv_tools.bench.engines` runs and compares them all.
"""
