"""Checkpoint folders: written aside and published whole, verified before they are read, loaded into any layout."""
