"""Text to token sequences, in an order that depends on nothing but the seed and the samples consumed."""
