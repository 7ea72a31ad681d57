"""Checkpoint folders: published whole, verified before they are read, loaded into any layout."""
