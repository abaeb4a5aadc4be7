"""Workflows of several steps and several runs: the stages in order, sweeps, the demo."""
