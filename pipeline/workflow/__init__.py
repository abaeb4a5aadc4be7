"""Several steps, several runs: the stages in order, sweeps, the demo."""
