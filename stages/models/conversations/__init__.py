"""Rendering of conversations by a model's chat template, and the role of each of its tokens."""
