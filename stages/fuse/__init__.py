"""The fuse stage: one distribution a position, and training blocks."""
