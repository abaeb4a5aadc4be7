"""Shard stage: documents become segments that fit every tokenizer of the run."""
