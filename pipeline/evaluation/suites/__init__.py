"""Benchmarks of lm-evaluation-harness on the models of a run; the harness is imported in harness.py alone."""
