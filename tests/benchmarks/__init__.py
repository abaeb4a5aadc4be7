"""Benchmarks: ``make bench``. Ratios and times are measured here, never asserted in a test."""
