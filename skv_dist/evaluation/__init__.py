"""Measurements of a trained model: loss by retention, sampled text."""
