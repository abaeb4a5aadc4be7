"""Configurations in their run directory: steps, inputs, and records."""
