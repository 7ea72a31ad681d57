"""What runs an exported model in each inference engine, importing nothing of skv_dist; `compare` runs them all."""
