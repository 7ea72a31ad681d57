"""What tests run inside worker processes, by theme."""
