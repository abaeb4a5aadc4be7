"""Fuse stage: one distribution per position, and training blocks."""
