"""Checkpoints on disk: index, names, slices."""
