"""Engines: whatever owns the parameters, gradients and optimizer state of one process."""
