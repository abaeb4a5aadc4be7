"""Backends that run a model over batches of tokens: one file per library."""
