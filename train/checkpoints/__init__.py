"""Checkpoints: write, find, read back, copy to an object store."""
