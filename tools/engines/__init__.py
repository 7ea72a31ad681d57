"""What runs an exported model in each inference engine. Each module imports its engine, and nothing of skv_dist."""
