"""Tests of pipeline.suites."""
