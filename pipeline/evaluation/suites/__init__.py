"""Benchmarks of lm-evaluation-harness on the models of a run; only harness.py imports the harness."""
